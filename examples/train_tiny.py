"""Train a two-layer byte model on packed sequences through `attnkit.ops.attention`.

Every step packs snippets of different lengths into one row of tokens; `cu_seqlens` keep them apart, so nothing is padded.

Run it with: python examples/train_tiny.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit import ops

TEXT = """
A lighthouse keeper wrote down what he saw. In the morning he saw the sea, and in the evening he saw the sea again. In the
winter the sea was grey, and in the summer the sea was green. A ship that came from the north kept the light on its left. A
ship that came from the south kept the light on its right. When the fog came in, the keeper rang the bell, and when the fog
went out, the keeper put the bell to rest. He counted the ships that came in the morning, and he counted the ships that came
in the evening. In the winter he counted few, and in the summer he counted many. When the book was full, the keeper began
another book, and in the morning he saw the sea.
"""
HEADS, KEY_HEADS, WIDTH, LONGEST = 4, 2, 16, 64
STEPS, SNIPPETS = 100, 12


class Block(nn.Module):
    """Attention with grouped heads, then two linear layers, each on a normalised residual stream."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.qkv = nn.Linear(hidden, (HEADS + 2 * KEY_HEADS) * WIDTH, bias=False)
        self.project = nn.Linear(HEADS * WIDTH, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[R, hidden] -> [R, hidden]."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, WIDTH))  # [R, H + 2 Hkv, D]
        q, k, v = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        out = ops.attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        x = x + self.project(out.flatten(1))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """Bytes in, next-byte logits out."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, hidden), nn.Embedding(LONGEST, hidden)
        self.blocks = nn.ModuleList([Block(hidden), Block(hidden)])
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 256)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens [R] of sequences that begin at cu_seqlens -> logits [R, 256]."""
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        x = self.bytes(tokens) + self.places(torch.arange(len(tokens)) - starts)
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return self.head(self.norm(x))


def batch(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Snippets of 16 to 64 bytes: inputs [R], the bytes that follow them [R], and the boundaries [N + 1]."""
    lengths = torch.randint(16, LONGEST + 1, (SNIPPETS,)).tolist()
    starts = [int(torch.randint(len(data) - length, ())) for length in lengths]
    inputs, targets = (
        torch.cat([data[start + shift : start + shift + length] for start, length in zip(starts, lengths, strict=True)])
        for shift in (0, 1)
    )
    return inputs, targets, torch.tensor([0, *lengths]).cumsum(0).int()


def main() -> None:
    """Train, print the loss on the way, and insist that it fell."""
    torch.set_num_threads(1)  # matrices this small are done before a second thread has woken up
    torch.manual_seed(0)
    data = torch.tensor(list(TEXT.encode()))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        inputs, targets, cu_seqlens = batch(data)
        loss = F.cross_entropy(model(inputs, cu_seqlens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step:3d}   {len(cu_seqlens) - 1} snippets, {len(inputs)} bytes   loss {losses[-1]:.2f} nats a byte")
    assert losses[-1] < 0.5 * losses[0], "the loss did not fall"


if __name__ == "__main__":
    main()
