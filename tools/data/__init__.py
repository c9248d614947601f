"""Rows of tokens to train and evaluate on, from any text, to be continued exactly where they stopped.

    files | Hub data set | builtin ─► Documents ─► PackedRows | PaddedRows ─┐
                                          │                                 ├─► TokenRows ─► Batch
                                      prepare ─► token shards ─► ShardRows ─┘

Each arrow is an iterator with `state_dict()`, JSON-able and small, and `load_state_dict(state)`. A state says
which token comes next; it never holds text or tokens, and it never counts what was only prefetched.
"""

from act24.tools.data.batches import Batch, HeldoutRows, TokenRows, heldout_rows, open_rows
from act24.tools.data.dealt import merged_state
from act24.tools.data.documents import Documents, open_documents
from act24.tools.data.hub import pinned
from act24.tools.data.prepare import data_from_argument, pinned_for, prepare_shards, refuse_taken
from act24.tools.data.tokenizer import Tokenizer, check_vocabulary, open_tokenizer

__all__ = [
    "Batch",
    "Documents",
    "HeldoutRows",
    "TokenRows",
    "Tokenizer",
    "check_vocabulary",
    "data_from_argument",
    "heldout_rows",
    "merged_state",
    "open_documents",
    "open_rows",
    "open_tokenizer",
    "pinned",
    "pinned_for",
    "prepare_shards",
    "refuse_taken",
]
