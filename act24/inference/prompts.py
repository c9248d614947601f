"""How prompts go through a model: in which chunks, and how their linears multiply.

A chunk has one of a few numbers of tokens, so that the blocks are compiled once for each. Weights that are
2:4 are multiplied by cuSPARSELt where the table of products says that it is faster for the tokens of the
chunk. The table has times of the GPU alone, and the host may take longer to call the library. So a decoder
that measures runs the first such chunk both ways, launches included, and keeps the faster one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from act24.inference.layer import LayerForm, cached_layers
from act24.inference.linears import prompt_algorithm
from act24.sparse24.format.products import Table

#: Tokens of a row that go through the model at once; attention scores grow with them.
CHUNK = 2048

#: Tokens of chunks for which blocks are compiled, ascending, each at most twice the one before. Shorter
#: prompts wait for launches; compiling for them would take as long as some hundred of them.
COMPILED = (256, 512, 1024, CHUNK)

#: Runs of a chunk that are timed; the fastest counts.
RUNS = 3

#: By the shape `[N, K]` of weights that cuSPARSELt multiplies, its algorithm.
Products = dict[tuple[int, int], int]


def chunks(tokens: int, compiled: bool) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of each chunk of a prompt of so many.

    Compiled chunks have sizes of `COMPILED`. The last of several begins early enough to be of such a size:
    what it repeats is computed again, and written where it stands already. There are two sizes at most, and
    at most a third more tokens than in the prompt, or the smallest chunk more.
    """
    if not compiled or tokens < COMPILED[0]:
        for start in range(0, tokens, CHUNK):
            yield start, min(CHUNK, tokens - start)
        return
    start, size = 0, max(each for each in COMPILED if each <= tokens)
    while start < tokens:
        if start and (rest := tokens - start) < size:
            size = min(each for each in COMPILED if each >= rest)
            start = tokens - size
        yield start, size
        start += size


def compiles_for(tokens: int) -> bool:
    """Whether blocks are compiled for chunks of so many tokens, where they are compiled at all."""
    return tokens in COMPILED


class PromptForms:
    """How the blocks of a model compute chunks of prompts.

    Attributes:
        table: what a tuner found of 2:4 products on this device.
        taken: by rows and tokens of a chunk, the products that were measured to be faster, or none.
        times: by rows and tokens of a chunk, its seconds dense, and with 2:4 products.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        sparse: frozenset[tuple[int, int]],
        table: Table,
        dtype: torch.dtype,
        device: torch.device,
        measures: bool,
    ) -> None:
        """
        Args:
            sparse: shapes `[N, K]` of the weights that are 2:4, and may be multiplied so.
            table: as the attribute.
            dtype, device: of what goes through.
            measures: which form is faster.
        """
        self._blocks, self._sparse, self.table, self._measures = blocks, sparse, table, measures
        self._dtype, self._device = dtype, device
        self._dense = cached_layers(blocks)
        self._by_products: dict[tuple[tuple[tuple[int, int], int], ...], list[LayerForm]] = {}
        self.taken: dict[tuple[int, int], Products] = {}
        self.times: dict[tuple[int, int], tuple[float, float]] = {}

    @property
    def packed(self) -> bool:
        """There are packed copies of weights."""
        return bool(self._by_products)

    def products(self, rows: int, tokens: int) -> Products:
        """What a chunk's 2:4 products are: as measured, and where nothing was, as the table has it.

        Args:
            tokens: of a row that go through the model at once.
        """
        if (rows, _size(tokens)) in self.taken:
            return self.taken[rows, _size(tokens)]
        found = {
            shape: prompt_algorithm(rows * tokens, shape, self.table, self._dtype, self._device)
            for shape in self._sparse
        }
        return {shape: algorithm for shape, algorithm in found.items() if algorithm is not None}

    def of(self, rows: int, tokens: int, run: Callable[[list[LayerForm]], Tensor]) -> list[LayerForm]:
        """The blocks' functions for a chunk.

        Args:
            tokens: of a row.
            run: the chunk through the blocks; called where it has to be measured what is faster.
        """
        products, key = self.products(rows, tokens), (rows, _size(tokens))
        forms = self._with(products)
        if not products or not self._measures or key in self.taken:
            return forms
        dense, sparse = (_seconds(run, each, self._device) for each in (self._dense, forms))
        self.times[key] = dense, sparse
        self.taken[key] = products if sparse < dense else {}
        return self._with(self.taken[key])

    def take(self, rows: int, products: Mapping[int, Products] | None) -> None:
        """Fix the 2:4 products of chunks with so many rows, by the chunks' tokens. None: forget them, and
        measure again at the next chunks."""
        self.taken = {key: each for key, each in self.taken.items() if key[0] != rows}
        if products is not None:
            self.taken |= {(rows, _size(tokens)): each for tokens, each in products.items()}

    def _with(self, products: Products) -> list[LayerForm]:
        if not products:
            return self._dense
        key = tuple(sorted(products.items()))
        if key not in self._by_products:
            with torch.inference_mode(False), torch.no_grad():  # packed weights are ordinary tensors
                self._by_products[key] = cached_layers(self._blocks, products=products)
        return self._by_products[key]


def _size(tokens: int) -> int:
    """The power of two that answers for so many tokens of a row."""
    return 1 << (tokens - 1).bit_length()


def _seconds(run: Callable[[list[LayerForm]], Tensor], forms: list[LayerForm], device: torch.device) -> float:
    """The time between two events around a run on an idle device. It counts the host's launches where they
    take longer than the device's work."""
    taken = []
    for _ in range(1 + RUNS):  # the first compiles, and loads kernels
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run(forms)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return min(taken[1:])
