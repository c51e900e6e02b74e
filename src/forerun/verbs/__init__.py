"""What each verb of the command line does; loaded when the verb is called."""
