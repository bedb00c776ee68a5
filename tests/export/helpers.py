"""What the export tests share: an export from python, and a model's logits on fixed tokens."""

import torch

from qat.config import ExportConfig
from qat.export import export


def run(source, output, **changes):
    return export(ExportConfig(source=str(source), output=str(output), progress_bar=False, **changes))


def logits(model, seed=0):
    ids = torch.randint(0, model.config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(ids).logits
