"""The rules as Flower strategies, one public class for each: `FLoRA` is that of `FLoRARule`.

Keyword arguments are those of `FactorStrategy`, the rule's own options (``lam``, ``period``, ``init_a``,
...), ``allocation`` (see `strategies.allocation`), and, where the aggregate is a mean, ``center`` (see
`strategies.robust`) and ``optimizer`` (see `strategies.server_optimizer`). Type checkers read the classes in
``strategies/__init__.pyi``, see `stub`.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from strategies.flower import FactorStrategy
from strategies.registry import COMPOSED, RULES, make_rule
from strategies.rule import Rule

SHARED = frozenset(inspect.signature(FactorStrategy.__init__).parameters) - {"self", "rule"}


class NamedStrategy(FactorStrategy):
    """A `FactorStrategy` whose rule is given by its class.

    Raises:
        ConfigError: an option that neither the strategy nor its rule has, or a value they refuse.
    """

    rule_type: ClassVar[type[Rule]]

    def __init__(self, **options: Any) -> None:
        shared = {key: value for key, value in options.items() if key in SHARED}
        own = {key: value for key, value in options.items() if key not in SHARED}
        composed = {key: own.pop(key) for key in COMPOSED if key in own}
        super().__init__(make_rule(self.rule_type, own, **composed), **shared)


def public_class(rule: type[Rule]) -> type[NamedStrategy]:
    """The strategy of a rule, by the rule's name without ``Rule``."""
    text = f"{(rule.__doc__ or '').splitlines()[0]} See `{rule.__module__}`."
    values = {"rule_type": rule, "__doc__": text, "__module__": __name__.rpartition(".")[0]}
    return type(rule.__name__.removesuffix("Rule"), (NamedStrategy,), values)


NAMED = {strategy.__name__: strategy for strategy in map(public_class, RULES.values())}
"""Public name -> strategy."""


def stub() -> str:
    """The text of ``strategies/__init__.pyi``."""
    names = ["RULES", *sorted(NAMED), "make_rule"]
    classes = [f"class {name}(NamedStrategy): ..." for name in sorted(NAMED)]
    return "\n".join(
        [
            "# Written from the registry: python -m experiments.readme",
            "from strategies.named import NamedStrategy",
            "from strategies.registry import RULES, make_rule",
            "",
            "__all__ = [",
            *(f'    "{name}",' for name in names),
            "]",
            "",
            *classes,
            "",
        ]
    )
