"""LoRA-A2: A and B by turns, and each client sends the directions that it changed most.

Koo, Jang, Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients",
ACL 2025 (arXiv 2410.22815). With N layers of global rank r, and a client's budget of r_k N directions,

    odd t:   A frozen,  score of direction j of layer l:  s ||dB_k,lj|| ||a_lj||,    dB_k = B_k - B
    even t:  B frozen,                                    s ||b_lj|| ||dA_k,lj||

    I_k = the r_k N directions of the highest scores, over all layers
    B' = B + sum_k p_k (dB_k)_{I_k},     A' = A                           (even t: the other way round)

so that a client of a small budget spends it where its data moves the model, and clients whose data differ
choose different directions. Exact for what is sent: what is frozen is the same for all.

A client knows its choice after it has trained, from what it sends anyway: in private training that is behind
the noise, so that the choice costs nothing. What it does not choose goes back to where it was. The server
refuses whoever changes more. A median takes what few choose for what lies apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.core.state import Broadcast, ClientSpec, State, Template
from strategies.facts import Facts
from strategies.rules.fslora import at_rank, check_rank
from strategies.rules.rolora import RoLoRARule


@dataclass(frozen=True, kw_only=True)
class LoRAA2Rule(RoLoRARule):
    """One factor trained in turn, and the mean of each client's largest changes.

    Attributes:
        rank: the global rank r, at least the largest of the clients, which it is if 0.

    Raises:
        ConfigError: a rank below 0, or at the start one below a client's.
    """

    rank: int = 0

    facts: ClassVar[Facts] = replace(
        RoLoRARule.facts,
        name="lora-a2",
        title="LoRA-A2",
        paper="Koo et al., ACL 2025, arXiv 2410.22815",
        any_kind=False,
        mixed_ranks=True,
        chooses_directions=True,
        up="r_k*o / r_k*i in turn",
        deviation="read in its text without the equations: the score is the size of a direction's change of "
        "the weight, chosen is after all local steps, in which all directions train; B comes first",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)

    @property
    def needs_all_directions(self) -> str:
        return "lets its clients choose directions"

    @property
    def coordinates_stay(self) -> bool:
        return False  # what a codec owes is of directions that are not chosen any more

    @property
    def upload(self) -> str:
        return "changed"

    def init(self, template: Template, seed: int) -> State:
        return super().init(at_rank(template, self.rank), seed)

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        whole = next(iter(state.adapters.values()))
        given = super().broadcast(state, replace(client, rank=whole.rank, scaling=whole.scaling))
        return replace(given, choose=client.rank * len(given.modules) if client.rank < whole.rank else 0)
