"""The tuner of one's own of docs/peft.md, used as the page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel

from fedlora.adapters import check_kind
from fedlora.config import LoraConfig, ModelConfig
from fedlora.errors import ConfigError
from fedlora.models import build_model
from tests.docs_commands import ROOT, blocks
from tests.federation.test_kinds import run
from tests.models.samples import logits, token_batch

(CODE,) = [code for code in blocks((ROOT / "docs" / "peft.md").read_text(), "python") if "Tuner" in code]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody stands who has the page's file."""
    (tmp_path / "mine.py").write_text(CODE + "\nSTRANGE = Tuner(name='x', config='NoConfig', paper='')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_it_runs_is_exact_and_loads_in_peft(there: Path, cache: Path) -> None:
    done = run(there, **{"lora.method": "mine:BEFT", "lora.rank": 8, "num-server-rounds": 1})
    assert "true" in (there / "run" / "result.json").read_text().partition('"exact":')[2][:8]
    folder = there / "run" / "adapter"
    assert PeftConfig.from_pretrained(folder).peft_type.value == "BEFT"
    base = build_model(ModelConfig(name="tiny"), 4, 1)
    loaded, batch = PeftModel.from_pretrained(base, folder).eval(), token_batch()
    model = done.runtime.model
    model.load(done.state.adapters, done.state.head)
    assert any(t.any() for a in done.state.adapters.values() for t in a.tensors().values())
    torch.testing.assert_close(logits(loaded, batch), logits(model.module, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("mine:STRANGE", "PEFT has no configuration 'NoConfig'"),
        ("mine:Tuner", r"is no fedlora\.adapters\.Tuner"),
        ("mine:NONE", "cannot be imported"),
        ("beft", "accepted are lora, .*, and module:TUNER of your own"),
    ],
)
def test_what_is_none_is_refused_in_one_line(method: str, words: str, there: Path) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_kind(LoraConfig(method=method))
    assert "\n" not in str(refused.value)


def test_a_rank_that_it_has_not_is_refused(there: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.rank = 4: beft has none"):
        check_kind(LoraConfig(method="mine:BEFT", rank=4))
