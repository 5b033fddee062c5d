"""Rewrites ``experiments/README.md``: ``python -m experiments.overview``.

What each study asks, how far it is, and what it found. State and tables come from the cells that are kept in
``experiments/published``; only questions and findings are written by hand, here.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.marked import remade
from experiments.publish import CELLS, read
from experiments.tables import HERE, PUBLISHED, planned
from fedlora.core.files import write_atomic

README = HERE / "README.md"
NOT_RUN = "Not run yet."


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One question.

    Attributes:
        name: of its file, and of its directory among the published ones.
        claim: what somebody published, and where.
        found: one line, with date and seeds.
    """

    name: str
    claim: str
    found: str = NOT_RUN


STUDIES = (
    Study(
        name="flora",
        claim="FLoRA (Wang et al., NeurIPS 2024): with mixed ranks exact stacking beats averages of "
        "the factors and zero-padding. Beside it: what starting anew in each round costs, where local "
        "steps are many and where they are few.",
        found="2026-11-23, ten seeds: probably, not certainly. FLoRA is ahead of zero-padding by 0.6 and 1.2 "
        "points, of FlexLoRA by 1.3 and 2.1, and of FedEx, which does not start anew, by 0.8 and 0.6; p "
        "below 0.1 each, 0.14 to 0.6 after Holm's correction.",
    ),
    Study(
        name="lora_fair",
        claim="LoRA-FAIR (Bian et al., ICCV 2025): it beats FedIT, FFA, FLoRA and FlexLoRA under feature "
        "shift, and under feature plus label shift; without its penalty (lambda = 0) it loses 4 points.",
        found="2026-11-22, ten seeds: no. Alike FedAvg under feature shift; FlexLoRA is ahead by 1.5 points "
        "there and by 2.9 under both (part of it a tuned rate), FLoRA by 2.5 under both; lambda = 0 loses "
        "nothing under feature shift.",
    ),
    Study(
        name="exact",
        claim="Exact aggregation is better (FedEx-LoRA, FLoRA, FedMomentum; FlexLoRA's SVD) than FedIT, at "
        "the same total of local steps: 100 rounds of 1, 10 of 10, 2 of 50.",
        found="2026-11-23, ten seeds: nowhere certain. Averaging is the less exact the less often one "
        "averages, but only in two rounds of 50 are FedEx (+0.9) and FLoRA (+0.8) ahead, not certain after "
        "Holm's correction; FlexLoRA is alike there.",
    ),
    Study(
        name="privacy",
        claim="FedSVD (NeurIPS 2025): under differential privacy it beats FedAvg and FFA.",
        found="2026-11-22, ten seeds: FedSVD ahead of FedAvg by 2.5, 2.1 and 1.7 points at epsilon 1, 3 and "
        "6, of FFA at its own rate by 0.9, 0.5 and 0.8, none of it certain after Holm's correction; without "
        "privacy undecided. Certain under privacy: at epsilon 1 an A that is renewed beats one that stays, "
        "by 1.0.",
    ),
    Study(
        name="adaptive",
        claim="This project's own question: does an A that really adapts (`fedsvd-renew`) help?",
        found="2026-11-22, 3 seeds, no claim: nothing that three seeds could tell on this task, at more "
        "bytes.",
    ),
    Study(
        name="time",
        claim="FedBuff (Nguyen et al., AISTATS 2022) and over-selection: sooner at an accuracy than waiting "
        "for all, with heavy-tailed devices; staleness hurts averages of factors more than exact sums.",
        found="2026-11-30, ten seeds: with over-selection FedAvg and FlexLoRA, in a buffer FedAvg and FLoRA "
        "are sooner on every seed, at 55 and 27 to 31 % of the time; over-selection for FLoRA and FedSVD is "
        "undecided, a deadline is sooner for nobody, and three of FLoRA's runs with one ended for want of "
        "replies. Staleness costs four points, factors no more than exact sums.",
    ),
    Study(
        name="memory",
        claim="FLoRA's and FlexLoRA's: where memory decides who can hold which rank, mixed ranks beat the "
        "least rank for all, and the largest for those who can.",
        found="2026-11-30, ten seeds: FLoRA with mixed ranks is ahead of rank 2 for all by 2.6 points, of "
        "zero-padding by 4.0 and of FlexLoRA by 6.6, on every seed, at fifteen times their downloads; "
        "against rank 16 for those who can hold it, undecided.",
    ),
    Study(
        name="layers",
        claim="LISA's (Pan et al., NeurIPS 2024), for federations: training some layers in each round is "
        "worth its bytes. Here at half of the uplink: half of the layers beside half of the rank.",
        found="2026-11-30, ten seeds: half of the rank is rather the better half (by 0.8 points, "
        "under FLoRA 0.7, seven of ten seeds each, undecided); layers that moved most are no better than "
        "random ones; all layers, for twice the uplink, lead random ones by 2.7 and 3.0, on all seeds.",
    ),
    Study(
        name="kinds",
        claim="Fed-SB (Singhal et al., 2025), FourierFT (Gao et al., ICML 2024), WaveFT: tens of numbers a "
        "layer are enough. Here at 1, 10 and 100 of them, beside LoRA of rank 1 and the head alone.",
        found="2026-11-30, ten seeds: 100 numbers a layer are worth 5.1 (a core) and 6.1 points (FourierFT) "
        "over the head alone, about as much as LoRA of rank 1; ten about a point, one nothing; WaveFT at its "
        "lowest rate tried is behind the head alone.",
    ),
    Study(
        name="optimizers",
        claim="LoRA-Pro (Wang et al., ICLR 2025) and ScaledGD (Zhang and Pilanci, ICML 2024) learn faster "
        "than AdamW and SGD on LoRA's factors. Here between rounds of averages, of stacks, and with privacy.",
        found="2026-11-30, ten seeds: AdamW leads SGD under FLoRA by 2.2 points; LoRA-Pro is "
        "not told from AdamW under FedAvg, behind it by 3.5 under FLoRA and by 22 with privacy; nor is "
        "ScaledGD from SGD under FedAvg.",
    ),
    Study(
        name="personal",
        claim="FedDPA (Yang et al., NeurIPS 2024): a local adapter beside the global one serves clients of "
        "other domains; FedSA (Guo et al., ICLR 2025): so does a B that stays.",
        found="2026-11-30, ten seeds: no gain. Second adapters are 0.4 points behind the global model in the "
        "mean over clients under FedAvg, 7.1 under FLoRA; FedSA and training alone are not told apart.",
    ),
    Study(
        name="private_factors",
        claim="FedASK (Wen et al., NeurIPS 2025) and LA-LoRA (2026): under differential privacy both factors "
        "can be trained and beat FFA and FedSVD, which train one.",
        found="2026-12-01, ten seeds: none of the four is told from FedAvg at epsilon 1, 3 or 6; LA-LoRA is "
        "alike within a point at epsilon 1. Training one factor is not ahead of training both, nor behind.",
    ),
    Study(
        name="mixed_ranks",
        claim="raFLoRA (Wu et al., 2026) and FSLoRA (Fang et al., 2025): with mixed ranks both are ahead of "
        "FlexLoRA, under which ranks that few clients have fade from round to round.",
        found="2026-11-30, ten seeds: raFLoRA is ahead of FlexLoRA by 2.2 points on all seeds, FSLoRA by 3.2 "
        "on eight; neither of zero-padding (undecided); FLoRA, which loses nothing, leads raFLoRA by 4.6 on "
        "all seeds, at twelve times its downloads.",
    ),
)


def rewritten(text: str) -> str:
    """The page with what stands between its markers made anew."""
    return remade(text, {"studies": _studies, "communication": _communication})


def _studies() -> str:
    return "\n\n".join(_study(study) for study in STUDIES)


def _study(study: Study) -> str:
    published = PUBLISHED / study.name
    done, total = progress(study.name)
    lines = [f"### [`{study.name}.toml`]({study.name}.toml)", "", study.claim, ""]
    where = f" ([text](published/{study.name}/README.md))" if (published / "README.md").exists() else ""
    kept = (published / CELLS).exists()
    state = f"{total} cells."
    if kept:
        took = f"they took {hours(study.name):.1f} h"
        state = f"{done} of {total} cells are kept in [`published`](published); {took}."
    lines += [f"**{study.found}**{where} {state}", "", "```console"]
    if kept:
        folder = f"experiments/published/{study.name} runs/{study.name}"
        lines.append(f"$ .venv/bin/python -m experiments.publish unpack {folder}")
    lines.append(
        f"$ .venv/bin/fedlora compare experiments/{study.name}.toml --out runs/{study.name} --resume"
    )
    return "\n".join([*lines, "```"])


def progress(name: str) -> tuple[int, int]:
    """Kept cells of a study, and how many it has in all, trials of rates among them."""
    _, cells, tried = planned(name)
    wanted = {cell.label for cell in (*cells, *(trial.cell for trial in tried))}
    return len(wanted & set(read(PUBLISHED / name))), len(wanted)


def hours(name: str) -> float:
    """What the kept cells of a study took, one after the other, whatever else the machine did."""
    results = (json.loads(files["result.json"]) for files in read(PUBLISHED / name).values())
    return sum(float(result["seconds"]) for result in results) / 3600


def _communication() -> str:
    lines = [
        "| study | run | seeds | accuracy | MB up | MB down | points over the majority for each MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in STUDIES:
        for group, found in _groups(study.name):
            up, down = (fmean(r[key] for r in found) / 1e6 for key in ("bytes_up", "bytes_down"))
            accuracy = fmean(r["accuracy"] for r in found)
            gained = 100 * fmean(r["accuracy"] - r["majority_accuracy"] for r in found) / (up + down)
            lines.append(
                f"| {study.name} | {group} | {len(found)} | {100 * accuracy:.1f} % | {up:.3g} | {down:.3g} | "
                f"{gained:.3g} |"
            )
    return "\n".join(lines)


def _groups(name: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The results of each group without privacy, all its kept seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for label, files in read(PUBLISHED / name).items():
        private = tomllib.loads(files["config.toml"])["privacy"]["mode"] != "none"
        if not private and not label.startswith("tuning-"):
            group = re.sub(r"-seed-\d+$", "", label)
            groups.setdefault(group, []).append(json.loads(files["result.json"]))
    yield from sorted(groups.items())


if __name__ == "__main__":
    write_atomic(README, rewritten(README.read_text()))
