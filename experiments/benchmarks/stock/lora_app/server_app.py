"""The stock server: Flower's FedAvg over the adapters' tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_app.task import build_model, load_test, setting_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; ``out`` gets a line for each and the last adapter."""
    setting = setting_of(context)
    rounds, out = setting["num-server-rounds"], Path(setting["out"])

    def after_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        record: dict[str, float] = {"round": server_round}
        if server_round == rounds:
            model = build_model(setting)
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            ids, mask, labels = next(iter(load_test(setting)))
            with torch.no_grad():
                logits = model.eval()(input_ids=ids, attention_mask=mask).logits
            record["accuracy"] = float((logits.argmax(1) == labels).float().mean())
        if server_round > 0:
            with (out / "rounds.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        return None

    strategy = FedAvg(
        fraction_train=setting["sampled"] / setting["population"],
        fraction_evaluate=0.0,
        min_train_nodes=setting["sampled"],
        min_available_nodes=setting["population"],
    )
    result = strategy.start(
        grid,
        ArrayRecord(load_file(setting["initial"])),
        num_rounds=rounds,
        evaluate_fn=after_round,
    )
    (out / "adapter").mkdir()
    save_file(result.arrays.to_torch_state_dict(), out / "adapter" / "adapter_model.safetensors")
