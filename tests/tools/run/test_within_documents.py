"""`data.attention = "document"`: training and evaluation against transformers' LLaMA, each document alone."""

import dataclasses
import functools
import itertools
import json
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from children import run_ranks
from fake_graphs import use_fake_graphs
from tiny import WORDS, load_tiny
from torch._dynamo.testing import CompileCounterWithBackend

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import LlamaMLP
from act24.passes import apply_
from act24.passes.document_attention import STARTS, DocumentAttention
from act24.recipes.checks import oddities
from act24.recipes.load import dump_recipe, parse_recipe
from act24.tools.data import heldout_rows, open_rows, open_tokenizer, prepare_shards
from act24.tools.huggingface.export import export_run
from act24.tools.run.build import build, check_attention, load, model_config, plan_recipe
from act24.tools.run.evaluate import evaluate, evaluate_checkpoint
from act24.tools.run.measurements import measure
from act24.tools.run.path import path_text
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.step import TrainingStep
from act24.tools.run.train import train

transformers = pytest.importorskip("transformers")

ALONE = Processes(0, 1, torch.device("cpu"))
WITHIN = ("data.attention=document", "data.max_length=32", "train.grad_clip=0")
DENSE = "passes=[]"


@pytest.fixture(scope="module")
def file(tiny_file, tmp_path_factory):
    """The tiny recipe on documents of 1 to 24 words, so that a row holds some whole ones and two halves."""
    folder = tmp_path_factory.mktemp("documents")
    words = itertools.cycle(WORDS)
    for name, first in (("train", 3), ("heldout", 1)):
        texts = [" ".join(itertools.islice(words, 1 + first * i * i % 24)) for i in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    text = tiny_file.read_text().replace("train-*.txt", "train.jsonl").replace("heldout.txt", "heldout.jsonl")
    (folder / "documents.toml").write_text(text.replace(str(tiny_file.parent), str(folder)))
    return folder / "documents.toml"


@pytest.fixture
def documents(file):
    return functools.partial(load_tiny, file, *WITHIN)


def opened(recipe, **where):
    tokenizer = open_tokenizer(recipe.data, recipe.tokenizer)
    size = {"batch_size": recipe.train.batch_size, "vocab_size": 300}
    return open_rows(recipe.data, tokenizer, **size, **where), tokenizer


def pieces(batch, end_of_text):
    """(ids, labels) of each document, or part of one, in the rows of a batch: from one end-of-text to the
    next, without what is padding."""
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        begins = [i for i, token in enumerate(ids) if i == 0 or token == end_of_text]
        for begin, end in itertools.pairwise([*begins, len(ids)]):
            if any(label >= 0 for label in labels[begin:end]):
                yield torch.tensor([ids[begin:end]]), torch.tensor([labels[begin:end]])


def theirs(model):
    """transformers' LLaMA with the weights of ours, in float64: no pass, no padding, no mask."""
    config = dataclasses.asdict(model.config)
    theta, _ = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).double()
    other.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    return other


def alone(model, batches, end_of_text):
    """The summed loss of all documents, each in a forward of its own, and the number of targets."""
    losses, count = [], 0
    for ids, labels in (piece for batch in batches for piece in pieces(batch, end_of_text)):
        logits = model(ids).logits
        losses.append(F.cross_entropy(logits[0], labels[0], reduction="sum", ignore_index=-100))
        count += int((labels >= 0).sum())
    assert len(losses) > 2 * sum(len(batch.input_ids) for batch in batches) or len(batches[0].labels[0]) < 32
    return torch.stack(losses).sum(), count


LAYOUTS = {
    "one after another": (),
    "shuffled": ("data.shuffle_buffer=16",),
    "shards": ("data.source=shards",),
    "accumulated": ("train.total_batch_size=12",),
    "recomputed": ("train.activation_checkpointing=true",),
    "grouped": ("model.num_key_value_heads=1",),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_each_document_alone(documents, layout, tmp_path):
    """Loss and gradients, for each way in which rows come about."""
    overrides = [DENSE, "train.total_batch_size=4", *LAYOUTS[layout]]
    if layout == "shards":
        plain = documents()
        shards = tmp_path / "shards"
        prepare_shards(plain.data, open_tokenizer(plain.data, plain.tokenizer), shards)
        overrides.append(f"data.shards={shards}")
    recipe = documents(*overrides)
    count = recipe.train.total_batch_size // recipe.train.batch_size
    rows, tokenizer = opened(recipe)
    with rows:
        batches = list(itertools.islice(rows, count))
    built = build(recipe, ALONE.device)
    built.model.double()
    plain = theirs(built.model)
    loss, tokens = alone(plain, batches, tokenizer.eos_id)
    (loss / tokens).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    result = step(batches, torch.optim.SGD(built.model.parameters(), lr=1.0))
    assert result.tokens == tokens
    torch.testing.assert_close(result.loss.double(), loss.detach() / tokens)
    for name, parameter in built.model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        moved = before[name] - parameter.detach()
        # Rotary angles are float32, and of other positions in the row than in the document alone.
        torch.testing.assert_close(moved, expected[name], rtol=1e-5, atol=1e-7)


def test_in_float32_rows_are_their_documents(documents):
    recipe = documents(DENSE)
    rows, tokenizer = opened(recipe)
    with rows:
        batch = next(rows)
    built = build(recipe, ALONE.device)
    expected, tokens = alone(theirs(built.model), [batch], tokenizer.eos_id)
    within, across = (
        losses(built, batch),
        losses(build(documents(DENSE, "data.attention=causal"), ALONE.device), batch),
    )
    torch.testing.assert_close(within.double(), expected / tokens, rtol=1e-6, atol=0)
    assert abs(across.double() - expected / tokens) > 1e-4  # attention across documents is another function


def test_transformers_keeps_documents_apart_where_positions_begin_anew(documents):
    """What docs/own-text.md tells those who pack texts there: the same function."""
    recipe = documents(DENSE)
    rows, _ = opened(recipe)
    with rows:
        batch = next(rows)
    built = build(recipe, ALONE.device)
    other = theirs(built.model).float()
    positions = torch.arange(32) - batch.starts
    with torch.no_grad():
        logits = other(batch.input_ids, position_ids=positions, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(losses(built, batch), loss, rtol=1e-6, atol=0)


def losses(built, batch):
    step = TrainingStep(built.model, built.recipe.train, ALONE, built.pipeline)
    loss, count = step.evaluation_loss(batch)
    return loss / count


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_held_out_measure_is_that_of_each_document_alone(documents, layout):
    """Also in rows that are filled up, and in the empty ones of a last batch."""
    recipe = documents(DENSE, f"data.rows={layout}", "eval.tokens=1000000", "eval.batch_size=7")
    tokenizer = open_tokenizer(recipe.data, recipe.tokenizer)
    rows = heldout_rows(recipe.data, tokenizer, recipe.eval.tokens, vocab_size=300)
    batches = list(rows.batches(7))
    assert any((batch.labels < 0).any() for batch in batches)
    built = build(recipe, ALONE.device)
    plain = theirs(built.model)
    with torch.no_grad():
        if layout == "packed":
            expected, tokens = alone(plain, batches, tokenizer.eos_id)
        else:
            summed = [row_loss(plain, row) for row in rows.rows]
            expected, tokens = torch.stack(summed).sum(), rows.tokens
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    for loss_of in (None, step.evaluation_loss):
        measured = evaluate(step.summed_loss, rows, recipe, ALONE, built.pipeline, step=0, loss_of=loss_of)
        assert measured.tokens == tokens == rows.tokens
        assert measured.loss == pytest.approx(float(expected) / tokens, rel=1e-6)


def row_loss(model, row):
    ids = torch.from_numpy(row).long()
    return F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """A run with 2:4 activations from its second step on, and statistics."""
    folder = tmp_path_factory.mktemp("run")
    overrides = ("train.steps=4", "schedule.warmup_steps=1", "checkpoint.every=2", "eval.tokens=500")
    recipe = load_tiny(file, *WITHIN, *overrides, "passes.activation24.from_step=1")
    return recipe, folder, train(recipe, folder)


def test_a_run_ends_with_the_measure_that_eval_finds_again(run):
    _, folder, outcome = run
    assert outcome.evaluation is not None
    found = evaluate_checkpoint(folder)["2:4"]
    assert found.loss == pytest.approx(outcome.evaluation.loss, rel=1e-6)
    with pytest.raises(
        Act24Error, match=r"eval ignores data\.attention: the checkpoint says what was trained"
    ):
        evaluate_checkpoint(folder, ["data.attention=causal"])


def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(run, tmp_path):
    recipe, folder, _ = run
    stopped = shutil.copytree(folder, tmp_path / "run")
    (last,) = stopped.rglob("step-*4")
    shutil.rmtree(last)
    assert train(recipe, stopped, resume="auto").step == 4
    ours = load(stopped).model.state_dict()
    for name, value in load(folder).model.state_dict().items():
        assert torch.equal(ours[name], value), name


def test_another_attention_is_another_run(run):
    recipe, folder, _ = run
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"attention": "causal"})})
    with pytest.raises(Act24Error, match=r"data\.attention was 'document' and is 'causal'"):
        train(other, folder, resume="auto")


def test_what_is_served_has_one_text_a_row(run, tmp_path):
    """Loaded or exported: plain causal attention, in which an end-of-text is a token like others."""
    _, folder, _ = run
    built = load(folder)
    assert "document_attention" not in {p.name for p in built.pipeline.active}
    said = export_run(folder, tmp_path / "exported", form="act24")
    assert "for one text a row" in said
    assert "for one text a row" in (tmp_path / "exported" / "README.md").read_text()
    saved = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert "document_attention" not in json.dumps(saved)
    end_of_text = built.tokenizer.eos_id
    ids = torch.tensor([[5, end_of_text, 7, 8]])
    with torch.no_grad():
        ours = built.model(ids)
        theirs = load(tmp_path / "exported").model(ids)
        other = built.model(torch.tensor([[6, end_of_text, 7, 8]]))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours[0, 3], other[0, 3])


def test_graphs_read_the_beginnings_of_each_batch(documents, monkeypatch):
    """Captured and replayed, as on a GPU: from memory that stays where it is."""
    recipe = documents("passes.activation24.from_step=4", "train.total_batch_size=4")
    rows, _ = opened(recipe)
    with rows:
        batches = list(itertools.islice(rows, 8))
    assert len({batch.starts.numpy().tobytes() for batch in batches}) == 8
    found = []
    for captured in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            fake = use_fake_graphs(patch) if captured else None
            built = build(recipe, ALONE.device)
            step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
            optimizer = torch.optim.SGD(built.model.parameters(), lr=0.1)
            results = [step([batch], optimizer, n).loss for n, batch in enumerate(batches)]
            evaluated = [step.evaluation_loss(batch)[0] for batch in batches[:4]]
            found.append((results, evaluated))
            if fake:
                assert [graph.replays for graph in fake.made] == [2, 2, 2]
            addresses = {module.get_buffer(STARTS).data_ptr() for module in built.pipeline.modules}
            assert len(addresses) == 1
    for a, b in zip(itertools.chain(*found[0]), itertools.chain(*found[1]), strict=True):
        assert torch.equal(a, b)


def test_blocks_are_compiled_whole_and_once(documents, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    recipe = documents(DENSE, "train.compile=on", "train.total_batch_size=4")
    built, plain = build(recipe, ALONE.device), build(recipe, ALONE.device)
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    off = recipe.train.model_copy(update={"compile": "off"})
    reference = TrainingStep(plain.model, off, ALONE, plain.pipeline)
    optimizers = [torch.optim.SGD(b.model.parameters(), lr=0.1) for b in (built, plain)]
    rows, _ = opened(recipe)
    with rows:
        for updates, batch in enumerate(itertools.islice(rows, 3)):
            ours = step([batch], optimizers[0], updates)
            torch.testing.assert_close(ours.loss, reference([batch], optimizers[1], updates).loss)
            assert counter.frame_count == 2  # both blocks are one graph, and the loss is another
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_lost_is_measured_within_documents(documents):
    """The scores of its columns, by gradients of each document alone."""
    text = dump_recipe(documents()).partition("[[passes]]")[0]
    lost = '\n[[passes]]\nuse = "lost"\nattn_rank = 8\nmlp_rank = 8\nmethod = "gradient"\nsparsity = 0.1\n'
    found = []
    for attention in ("document", "causal"):
        recipe = parse_recipe(text + lost, "test", [f"data.attention={attention}"])
        rows, tokenizer = opened(recipe)
        with rows:
            batch = next(rows)
        wanted = plan_recipe(recipe).measurements
        scores = measure(recipe, wanted, batch, ALONE)
        plain = theirs(build_llama(model_config(recipe), recipe.train.seed))
        loss, tokens = alone(plain, [batch], tokenizer.eos_id)
        (loss / tokens).backward()
        found.append(
            [
                torch.allclose(
                    scores[name].double(),
                    plain.get_parameter(one.parameter).grad.norm(dim=0),
                    rtol=1e-4,
                    atol=1e-7,
                )
                for name, one in wanted.items()
            ]
        )
    assert all(found[0])
    assert not all(found[1])


def parallel_losses(file, parallel, out):
    recipe = load_tiny(file, *WITHIN, DENSE, f"train.parallel={parallel}", "train.total_batch_size=8")
    with open_processes() as processes:
        built = build(recipe, processes.device)
        step = TrainingStep(built.model, recipe.train, processes, built.pipeline)
        optimizer = torch.optim.SGD(built.model.parameters(), lr=0.1)
        rows, _ = opened(recipe, rank=processes.rank, world_size=processes.world_size)
        with rows:
            losses = [float(step([next(rows)], optimizer, n).loss) for n in range(3)]
        if processes.is_main:
            out.write_text(json.dumps(losses))
        del step


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_within_documents(file, parallel, tmp_path):
    run_ranks(2, parallel_losses, file, parallel, tmp_path / "losses")
    found = json.loads((tmp_path / "losses").read_text())
    recipe = load_tiny(file, *WITHIN, DENSE, "train.total_batch_size=8")
    built = build(recipe, ALONE.device)
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    optimizer = torch.optim.SGD(built.model.parameters(), lr=0.1)
    ranks = [opened(recipe, rank=rank, world_size=2)[0] for rank in (0, 1)]
    with ranks[0], ranks[1]:
        for n in range(3):
            loss = step([next(rows) for rows in ranks], optimizer, n).loss
            assert found[n] == pytest.approx(float(loss), rel=1e-5)


def test_a_model_whose_attention_is_not_seen_is_refused(documents, tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    text = dump_recipe(documents(DENSE))
    text = (
        text.partition("[model]")[0]
        + f'[model]\npretrained = "{tmp_path}/gpt2"\n\n['
        + (text.partition("[model]")[2].partition("\n[")[2])
    )
    recipe = parse_recipe(text, "test")
    with pytest.raises(Act24Error, match=r'data\.attention = "document" is for LLaMAs, and .*gpt2 is a gpt2'):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_block_that_is_not_reached_would_cross_documents(documents):
    recipe = documents(DENSE)
    model = build_llama(model_config(recipe), 0)
    pipeline = apply_(model, [DocumentAttention(targets=("model.layers.0",))])
    with pytest.raises(Act24Error, match=r"attention of 1 of 2 blocks could not be traced, and would cross"):
        check_attention(recipe, pipeline)


def test_a_block_of_which_attention_alone_is_traced_is_reached(documents, monkeypatch):
    """Its network looks at the clock, which a graph would freeze."""
    recipe, forward = documents(DENSE), LlamaMLP.forward

    def looks(self, hidden_states):
        return forward(self, hidden_states) if time.perf_counter() else hidden_states

    monkeypatch.setattr(LlamaMLP, "forward", looks)
    rows, tokenizer = opened(recipe)
    with rows:
        batch = next(rows)
    built = build(recipe, ALONE.device)
    assert [*built.pipeline.regions] == [f"model.layers.{n}.self_attn" for n in (0, 1)]
    expected, tokens = alone(theirs(built.model), [batch], tokenizer.eos_id)
    torch.testing.assert_close(losses(built, batch).double(), expected.detach() / tokens, rtol=1e-6, atol=0)


def test_rows_that_do_not_say_where_documents_begin_are_refused(documents):
    recipe = documents(DENSE, "train.total_batch_size=4")
    rows, _ = opened(documents("data.attention=causal"))
    with rows:
        batch = next(rows)
    assert batch.starts is None
    built = build(recipe, ALONE.device)
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    with pytest.raises(Act24Error, match=r"come without the beginnings of their documents"):
        step([batch], torch.optim.SGD(built.model.parameters(), lr=0.1))


def test_what_is_said_of_it(documents):
    recipe = documents()
    built = build(recipe, ALONE.device)
    said = path_text(built.pipeline, recipe, ALONE.device)
    assert "attention within documents: PyTorch's, with a mask of all pairs of a row" in said
    assert "causal attention within documents" in str(plan_recipe(recipe))
    padded = documents("data.rows=padded")
    assert [line for line in oddities(padded) if "changes nothing" in line]
    assert "within documents" not in str(plan_recipe(documents("data.attention=causal")))
    assert not [line for line in oddities(recipe) if "data.attention" in line]
