"""The claims that can be run, by name."""

from attnkit._core.registry import Registry
from attnkit.lab.claims import (
    entmax_anneal,
    entmax_encoder,
    entmax_iterations,
    entmax_lm,
    entmax_recall,
    entmax_retrieval,
    kv_needles,
    kv_recall,
    mlstm_lm,
    mlstm_transfer,
    scfa_lm,
)
from attnkit.lab.claims.claim import Claim

__all__ = ["CLAIMS"]

CLAIMS: Registry[Claim] = Registry("claim")
for _module in (
    entmax_recall,
    entmax_iterations,
    entmax_anneal,
    entmax_lm,
    scfa_lm,
    entmax_encoder,
    entmax_retrieval,
    mlstm_transfer,
    mlstm_lm,
    kv_recall,
    kv_needles,
):
    CLAIMS.register(_module.CLAIM.name, _module.CLAIM)
