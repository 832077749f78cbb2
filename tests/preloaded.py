"""What the processes of tests find ready, because the one that they are forked from imports this module.

That one must have a single thread afterwards: a forked process has no other.
"""

import torch
import torch._dynamo

import tests.commands
import tests.test_contract  # noqa: F401
from common.metrics import retrieval_values
from common.registry import DATASETS, MODELS, RUNNERS
from dataset.texts.tokenizer import tokenize

torch.set_num_threads(1)
for registry in (MODELS, RUNNERS, DATASETS):
    registry.names()  # imports them
tokenize(["a"], 3)  # reads the table of merges
codes, labels = torch.ones(1, 8), torch.ones(1, 1)
retrieval_values(codes, codes, labels, labels, ["all"], ["relevant"])  # loads what is compiled
