"""Training of draft models and heads by distillation from the target."""
