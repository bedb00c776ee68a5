"""Noise on what both models read in training: some tokens are replaced by what the teacher would have written there.

A teacher has often read the very text that a student is trained on, and is surer of it than of other text. Replaced
tokens lead it away from what it knows by heart. What the student is to learn is its answer to what both read.
"""

import torch
from torch import Tensor

from qat.distill import Head


@torch.no_grad()
def replace_tokens(ids: Tensor, hidden: Tensor, head: Head, share: float, chunk_tokens: int = 2048) -> Tensor:
    """Token ids, some of them replaced by samples of a model that read what stands before them; the first one stays.

    The share that is replaced is itself random from window to window, uniform from 0 to twice `share`, so that clean
    text is read as well. Random numbers are those of the ids' device.

    Args:
        ids: int64 [B, T].
        hidden: last hidden states of the model for them, [B, T, D].
        head: of the model.
        share: of the tokens that are drawn anew, on average; 0 to 0.5. A sample can be the token that was there.
        chunk_tokens: tokens whose logits exist at once.
    """
    drawn = [_sample(head(part)) for part in hidden[:, :-1].flatten(0, 1).split(chunk_tokens)]
    shares = 2 * share * torch.rand(len(ids), 1, device=ids.device)
    chosen = torch.rand(len(ids), ids.shape[1] - 1, device=ids.device) < shares
    later = torch.where(chosen, torch.cat(drawn).reshape(chosen.shape), ids[:, 1:])
    return torch.cat([ids[:, :1], later], dim=1)


def _sample(logits: Tensor) -> Tensor:
    """Tokens [T] of the softmax of logits [T, V]: the largest of them with Gumbel noise."""
    logits = logits.float()
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=-1)
