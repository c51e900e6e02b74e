"""The target's hidden state that heads draft from.

Shape suffixes: B rows, N nodes, T tokens, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

from forerun.draft.protocol import Outcome


class EndState:
    """Of each row the state at its last committed position, the one before the pending token: what the token was drawn from."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.state_BH: Tensor | None = None  # allocated when the first row is admitted

    def admit(self, row: int, hidden_TH: Tensor | None) -> None:
        assert hidden_TH is not None, "the target was not asked for its hidden states: features=(-1,)"
        if self.state_BH is None:
            self.state_BH = hidden_TH.new_zeros(self.rows, hidden_TH.shape[1])
        self.state_BH[row] = hidden_TH[-1]

    def observe(self, outcome: Outcome) -> None:
        """The end of each row's accepted path; idle rows get rubbish, which nobody reads."""
        assert outcome.hidden_BNH is not None
        verdict = outcome.verdict
        end_B1 = verdict.path_BD.gather(1, verdict.accepted_B[:, None] - 1)
        size = outcome.hidden_BNH.shape[2]
        self.state_BH = outcome.hidden_BNH.gather(1, end_B1[:, :, None].expand(-1, 1, size))[:, 0]

    def read(self) -> Tensor:
        assert self.state_BH is not None, "no row was admitted"
        return self.state_BH
