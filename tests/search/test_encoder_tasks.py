"""What is peculiar to the tasks of encoders: what is masked, how documents are made, and that encoders learn them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from heddle.compose.build import build
from heddle.compose.hf.encoder import HeddleForMaskedLM, HeddleForSequenceClassification
from heddle.compose.train import IGNORE, Recipe, Trainer, labelled_logits
from heddle.errors import HeddleError
from heddle.search.evaluate import Training, train_and_score
from heddle.search.latency import Effort, Place, measure
from heddle.search.tasks.corpus import Corpus
from heddle.search.tasks.masked_bytes import MaskedBytes
from heddle.search.tasks.paragraph_topic import ParagraphTopic
from heddle.search.tasks.tokens import Tokens, tokens_of
from heddle.search.training_step import TrainingStep
from heddle.specs import MaskedBytesTask, ModelSpec, loads
from heddle.specs.tasks import ParagraphTopicTask

CPU = torch.device("cpu")
LINES = "".join(f"line {number} of {number * 7919 % 1000}\n" for number in range(4000)).encode()
ENCODER = """
version: 1
name: tiny
model:
  kind: encoder
  vocab_size: 256
  hidden_size: 32
  {readout}
  blocks: {{both: {{mixer: {{kind: attention, heads: 2, causal: false}}, channel: {{kind: gelu, ratio: 1.0}}}}}}
  layers: [both, both]
"""


def encoder(classes: int | None = None) -> ModelSpec:
    readout = "" if classes is None else f"readout: {{kind: ep, classes: {classes}, queries: 8}}"
    return loads(ENCODER.format(readout=readout)).spec.model


def masked(*, of_readout: bool = False, share: float = 0.15, length: int = 64) -> MaskedBytes:
    corpus = Corpus("lines", LINES[:60_000], LINES[60_000:], "digest", 1, "block")
    tokens, spec = tokens_of(corpus, "bytes", 256), MaskedBytesTask(share=share)
    return MaskedBytes(spec, tokens, sequence_length=length, vocab_size=256, of_readout=of_readout)


def topics(**fields: int) -> ParagraphTopic:
    return ParagraphTopic(ParagraphTopicTask(**fields), vocab_size=256)


def test_of_the_bytes_asked_for_most_are_masked_some_random_and_some_as_they_were() -> None:
    inputs, targets = masked().sample(400, seed=0, device=CPU)
    asked = targets != IGNORE
    assert torch.equal(asked.sum(dim=1), torch.full((400,), 10))
    shown, stood = inputs[asked], targets[asked]
    shares = [float(one.double().mean()) for one in (shown == 255, shown == stood)]
    assert shares == [pytest.approx(0.8, abs=0.03), pytest.approx(0.1, abs=0.02)]
    whole = torch.where(asked, targets, inputs).to(torch.uint8).numpy()
    assert all(row.tobytes() in LINES for row in whole)


@pytest.mark.parametrize(("share", "asked"), [(0.001, 1), (0.15, 10), (1.0, 64)])
def test_a_share_asks_for_one_byte_at_least_and_for_all_at_most(share: float, asked: int) -> None:
    _, targets = masked(share=share).sample(4, seed=0, device=CPU)
    assert torch.equal((targets != IGNORE).sum(dim=1), torch.full((4,), asked))


def test_a_readout_is_asked_for_the_one_byte_that_is_masked() -> None:
    task = masked(of_readout=True)
    inputs, targets = task.sample(200, seed=0, device=CPU)
    places = inputs == 255
    assert torch.equal(places.sum(dim=1), torch.ones(200, dtype=torch.int64))
    whole = torch.where(places, targets, inputs).to(torch.uint8).numpy()
    assert all(row.tobytes() in LINES for row in whole)
    # Every place is asked for.
    assert len(places.int().argmax(dim=1).unique()) > 50


def test_a_readout_learns_from_shorter_windows_too_and_is_scored_on_whole_ones_alone() -> None:
    task = masked(of_readout=True, length=32)
    shapes = [task.training_batch(256, seed=seed, device=CPU)[0].shape for seed in range(200)]
    assert {tuple(shape) for shape in shapes} == {(8, 32), (16, 16), (32, 8)}
    assert sum(shape[1] == 32 for shape in shapes) == pytest.approx(100, abs=30)
    assert task.held_out(CPU)[0].shape[1] == 32


def test_more_windows_are_held_out_where_each_is_asked_for_one_byte() -> None:
    assert len(masked(length=8).held_out(CPU)[0]) == 256
    assert len(masked(of_readout=True, length=8).held_out(CPU)[0]) > 256


@pytest.mark.parametrize("of_readout", [False, True])
def test_the_unigram_is_what_a_model_of_the_train_splits_frequencies_scores(of_readout: bool) -> None:
    task = masked(of_readout=of_readout)
    counts = torch.from_numpy(np.bincount(task.text.tokens.train, minlength=256) + 1.0)
    model = build(encoder(256 if of_readout else None))
    assert isinstance(model, HeddleForMaskedLM | HeddleForSequenceClassification)

    def same(*_: object, **__: object) -> Tensor:
        return counts.log().float()

    with torch.no_grad():
        if isinstance(model, HeddleForSequenceClassification):
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(same())
        else:
            model.logits = lambda hidden: same().expand(len(hidden), -1)  # type: ignore[method-assign]
    score = task.evaluate(model, device=CPU)
    assert score.value == pytest.approx(score.extras["unigram_bits_per_byte"], rel=1e-4)
    assert score.value < task.chance == 8.0


def test_tokens_count_by_the_bytes_they_stand_for() -> None:
    ids = np.arange(2000, dtype=np.uint8) % 5
    one, two = (Tokens(ids, ids, np.full_like(ids, size), f"{size}") for size in (1, 2))
    model = build(encoder()).eval()
    spec = MaskedBytesTask()
    scores = [
        MaskedBytes(spec, tokens, sequence_length=16, vocab_size=256).evaluate(model, device=CPU).value
        for tokens in (one, two)
    ]
    assert scores[0] == pytest.approx(2 * scores[1])


def test_a_mask_that_stands_in_the_text_is_refused_with_a_way_out() -> None:
    ids = np.full(2000, 255, dtype=np.uint8)
    tokens = Tokens(ids, ids, np.ones_like(ids), "digest")
    with pytest.raises(HeddleError, match=r"hint: model\.vocab_size: 257") as told:
        MaskedBytes(MaskedBytesTask(), tokens, sequence_length=16, vocab_size=256)
    assert told.value.code == "out-of-range"
    MaskedBytes(MaskedBytesTask(), tokens, sequence_length=16, vocab_size=257)


def test_one_topic_has_more_paragraphs_than_each_other() -> None:
    task = topics(topics=5, topic_words=3, paragraphs=9, paragraph_length=6, majority=3)
    inputs, targets = task.sample(300, seed=0, device=CPU)
    paragraphs = inputs.view(300, 9, 6)
    assert not paragraphs[:, :, 0].any()
    words = paragraphs[:, :, 1:]
    assert int(words.min()) > 0
    of_topic = torch.where(words <= 15, (words - 1) // 3, -1)
    own = of_topic.amax(dim=-1)
    assert int(own.min()) >= 0
    # No paragraph has words of two topics.
    assert bool(((of_topic == own[..., None]) | (of_topic < 0)).all())
    counts = torch.nn.functional.one_hot(own, 5).sum(dim=1)
    assert torch.equal(counts.argmax(dim=1, keepdim=True), targets)
    assert torch.equal(counts.amax(dim=1), torch.full((300,), 3))
    assert torch.equal((counts == 3).sum(dim=1), torch.ones(300, dtype=torch.int64))
    sizes = (of_topic >= 0).sum(dim=-1).flatten()
    assert torch.equal(sizes.unique(), torch.arange(1, 6))


def test_counting_words_answers_less_than_counting_paragraphs_and_more_than_chance() -> None:
    task = topics()
    counted = task.baselines(*task.held_out(CPU))["word_count_accuracy"]
    assert 2 * task.chance < counted < 0.8
    whole = topics(paragraphs=3, majority=3)
    assert whole.baselines(*whole.held_out(CPU))["word_count_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"majority": 9}, "8 paragraphs are no 9"),
        ({"majority": 2, "topics": 3}, "3 topics with fewer than 2 paragraphs each but one fill no 8"),
    ],
)
def test_documents_that_cannot_be_made_are_refused(fields: dict[str, int], told: str) -> None:
    with pytest.raises(HeddleError, match=told) as caught:
        topics(**fields)
    assert caught.value.code == "out-of-range"


@pytest.mark.parametrize("of_readout", [False, True])
def test_an_encoder_learns_masked_bytes(of_readout: bool) -> None:
    # Most windows hold one letter alone.
    runs = b"".join(bytes([letter]) * 64 for letter in b"acegikmoqsuw")
    corpus = Corpus("runs", runs * 12, runs * 3, "digest", 1, "block")
    tokens, spec = tokens_of(corpus, "bytes", 256), MaskedBytesTask()
    task = MaskedBytes(spec, tokens, sequence_length=16, vocab_size=256, of_readout=of_readout)
    recipe = Recipe(tokens=60_000, batch_tokens=1024, learning_rate=1e-2)
    result = train_and_score(Training(encoder(256 if of_readout else None), recipe, "cpu"), task).result
    assert result["task"] == "masked_bytes"
    assert result["value"] < result["extras"]["unigram_bits_per_byte"] / 2
    assert result["extras"]["accuracy"] > 0.5


def test_an_encoder_learns_the_topic_of_most_paragraphs() -> None:
    task = topics(topics=2, topic_words=2, common_words=4, paragraphs=3, paragraph_length=4, majority=2)
    recipe = Recipe(tokens=60_000, batch_tokens=1024, learning_rate=1e-2)
    result = train_and_score(Training(encoder(2), recipe, "cpu"), task).result
    assert result["value"] > result["extras"]["word_count_accuracy"] > task.chance


def test_scores_of_classes_are_what_a_readout_is_trained_by() -> None:
    model, task = build(encoder(4)).eval(), topics()
    inputs, targets = task.sample(6, seed=0, device=CPU)
    logits = model(inputs).logits
    assert torch.equal(labelled_logits(model, inputs, None), logits)
    assert torch.equal(labelled_logits(model, inputs, torch.tensor([4, 1])), logits[[4, 1]])
    expected = model(inputs, labels=targets.flatten()).loss.detach()
    told = Trainer(model, Recipe(tokens=1), 1, CPU).update(inputs, None, targets.flatten())
    assert torch.equal(told.loss, expected)


@pytest.mark.parametrize(("classes", "phase"), [(None, "prefill"), (3, "train")])
def test_a_pass_and_a_training_step_of_an_encoder_are_timed(classes: int | None, phase: str) -> None:
    spec, quick = encoder(classes), Effort(warmup=1, least=2, most=3, seconds=0.1, builds=1)
    row = measure(spec, Place(phase, 2, 16), device="cpu", effort=quick)
    assert row.median_ms > 0
    assert row.peak_bytes is not None


@pytest.mark.parametrize("classes", [None, 3])
def test_a_training_step_of_an_encoder_leaves_gradients_everywhere(classes: int | None) -> None:
    model = build(encoder(classes))
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    TrainingStep(model, ids)()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
