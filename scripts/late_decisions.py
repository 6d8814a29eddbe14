"""How surely models of the late world read each leg's cue in right texts, 96 dev problems: one row a model.

    python scripts/late_decisions.py late:student RUN/model

Below what the student began with: taught the misled teacher's wrong readings.
"""

from __future__ import annotations

import sys

import torch

from headstart.config.schema import ModelConfig
from headstart.models.load import load_model, load_tokenizer
from headstart.tasks.late import LateTask, puzzle


def right_readings(path: str, problems: int = 96) -> list[float]:
    """Mean probability of the right reading at each leg, all earlier decisions being right."""
    config = ModelConfig(path=path, dtype="float32")
    model, tokenizer = load_model(config, torch.device("cpu")), load_tokenizer(config)
    rows = []
    for index, problem in enumerate(LateTask("dev", problems).problems()):
        shown = puzzle("dev", index)
        prompt = tokenizer.apply_chat_template(list(problem.messages or ()), add_generation_prompt=True)["input_ids"]
        ids = [*prompt, *tokenizer.convert_tokens_to_ids(shown.response(shown.plan))]
        with torch.inference_mode():
            probabilities_TV = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        before = torch.tensor(shown.decisions) + len(prompt) - 1
        rows.append(probabilities_TV[before, torch.tensor(tokenizer.convert_tokens_to_ids(list(shown.plan)))])
    mean: list[float] = torch.stack(rows).mean(0).tolist()
    return mean


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        print(f"{path:40}", " ".join(f"{share:.3f}" for share in right_readings(path)))
