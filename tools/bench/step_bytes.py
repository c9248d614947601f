"""The bytes that a training step moves at least beside its products: each stage between two products as one
kernel, which reads and writes every tensor once.

Sizes are in elements; D is the width of the residual stream, T tokens, F features. Activations are of 2
bytes, the residual stream and its gradient of the embedding's dtype: 4 bytes under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

from act24.llama import LlamaConfig
from act24.loss import CHUNK_TOKENS
from act24.tools.bench.kernel_groups import ATTENTION, CASTS, ELEMENTWISE, EMBEDDING, LOSS, OPTIMIZER, OWN

_ACTIVATION = 2

#: Bytes an element of [T, F] between the products of a feed-forward network, forward and backward. SwiGLU
#: reads gate and up and writes the product; backward it reads these two and a gradient and writes two. A
#: packed matrix has 1.125 bytes an element (values of 2 bytes for every other one, 2 of 16 bits to tell
#: which); `act24.tools.bench.pack` has the same figures for the kernels.
FORMS = {
    "swiglu": (3 * 2, 5 * 2),
    "relu2": (2 * 2, 3 * 2),
    "masked": (2 * 2, 3 * 2),
    "packed dense": (3.125, 8.25),
    "packed split_gemm": (3.125, 6.7),
    "packed sparse": (3.125, 6.5),
}


@dataclass(frozen=True)
class Shape:
    """What the bytes depend on.

    Attributes:
        tokens, length: of a micro-batch, and of a row.
        features: F.
        form: of `FORMS`.
        residual, parameter, moment: bytes of an element.
        casts: weights are rounded to 16 bits for the products, and their gradients back.
        micro_batches: of an update.
    """

    tokens: int
    length: int
    config: LlamaConfig
    features: int
    form: str
    residual: int
    parameter: int
    moment: int
    casts: bool
    micro_batches: int

    @property
    def linears(self) -> int:
        """Parameters of the linears of all blocks and of the head."""
        config = self.config
        heads = 2 * config.num_attention_heads + 2 * config.key_value_heads
        matrices = 3 if self.form == "swiglu" else 2
        block = config.hidden_size * (heads * config.head_width + matrices * self.features)
        return config.num_hidden_layers * block + config.vocab_size * config.hidden_size


def norm_bytes(shape: Shape) -> float:
    """Of the residual stream in a block, an element of [T, D]: twice a sum and a norm.

    Forward a stage reads stream and branch, writes stream and norm. Backward it reads the gradients of all
    products of the norm (three of attention, one or two of the network), the stream, and its gradient, and
    writes that, and once more in 16 bits for the products of the branch before.
    """
    branches = 3 + (2 if shape.form == "swiglu" else 1)
    forward = 2 * (2 * shape.residual + 2 * _ACTIVATION)
    backward = branches * _ACTIVATION + 2 * (3 * shape.residual + _ACTIVATION)
    return forward + backward


def bytes_of(shape: Shape) -> dict[str, float]:
    """Of every group beside products, in one micro-batch, with its share of the update."""
    config, tokens = shape.config, shape.tokens
    blocks, width, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    queries = config.num_attention_heads * config.head_width
    keys = config.key_value_heads * config.head_width
    rotary = 4 * _ACTIVATION * (queries + keys)  # read and written, forward and backward
    network = sum(FORMS[shape.form]) * shape.features
    own = network if shape.form.startswith(("packed", "masked")) else 0
    stream = norm_bytes(shape) * width
    everything = shape.linears + vocabulary * width + (2 * blocks + 1) * width
    chunks = -(-tokens // CHUNK_TOKENS)
    # Gradients are read as products leave them, and added to those there are.
    added = _ACTIVATION + 2 * shape.parameter
    cast = shape.parameter + _ACTIVATION if shape.casts else 0
    # The head's gradient is added up in float32 over the chunks.
    head = vocabulary * width * (_ACTIVATION + 2 * 4) * chunks
    # For the norm a gradient is read, for the update read and for the next one zeroed.
    update = 5 * shape.parameter + 4 * shape.moment
    return {
        OWN: blocks * tokens * own,
        ATTENTION: blocks * tokens * _ACTIVATION * (6 * queries + 6 * keys),
        ELEMENTWISE: blocks * tokens * (rotary + stream + network - own),
        # Read for the sum of exponentials, read again and written as gradients.
        LOSS: 3 * _ACTIVATION * tokens * vocabulary,
        # Rows are read and written; backward their gradients are read, and added to rows of the table.
        EMBEDDING: (3 * tokens + 2 * min(tokens, vocabulary)) * width * shape.residual,
        CASTS: shape.linears * (cast + added) + head,
        OPTIMIZER: everything * update / shape.micro_batches,
    }


def attention_operations(shape: Shape) -> float:
    """Operations of attention: two products forward and five backward, of half a square a row."""
    queries = shape.config.num_attention_heads * shape.config.head_width
    return shape.config.num_hidden_layers * 7 * shape.tokens * shape.length * queries
