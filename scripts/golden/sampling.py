"""Makes test/golden/sampling.json: which tokens transformers' logits processors leave, and with which probabilities.

    python scripts/golden/sampling.py
"""

from common import GOLDEN, MADE_WITH, deterministic, write_json

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

V = 24
PROMPT = [3, 7, 7, 1]
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "topK": 5},
    {"temperature": 1.3, "topP": 0.8},
    {"temperature": 0.9, "topP": 0.05},
    {"temperature": 1.0, "minP": 0.2},
    {"temperature": 1.5, "topK": 9, "topP": 0.9, "minP": 0.05},
    {"temperature": 1.0, "repetitionPenalty": 1.7},
    {"temperature": 0.8, "repetitionPenalty": 0.6, "topK": 6},
]

deterministic(7)
logits = (2 * torch.randn(V)).to(torch.float32)
cases = []
for settings in SETTINGS:
    processors = LogitsProcessorList()
    if "repetitionPenalty" in settings:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["repetitionPenalty"]))
    processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if "topK" in settings:
        processors.append(TopKLogitsWarper(settings["topK"]))
    if "topP" in settings:
        processors.append(TopPLogitsWarper(settings["topP"]))
    if "minP" in settings:
        processors.append(MinPLogitsWarper(settings["minP"]))
    scores = processors(torch.tensor([PROMPT]), logits[None].clone())[0]
    cases.append({"settings": settings, "probabilities": scores.softmax(-1).tolist()})

write_json(
    GOLDEN / "sampling.json",
    {"made_with": MADE_WITH, "prompt": PROMPT, "logits": logits.tolist(), "log_softmax": logits.log_softmax(-1).tolist(), "cases": cases},
)
