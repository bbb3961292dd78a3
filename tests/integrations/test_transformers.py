"""Hugging Face models that compute their own loss, in a plain loop and in the Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import flat
from torch import nn

from adler import Adler, AdlerAdam, AdlerScheduleFree, GaussNewton
from adler.integrations.transformers import causal_lm, masked_lm, sequence_classification

transformers = pytest.importorskip("transformers")

pytestmark = [
    # Trainer asks for pinned memory whatever the device.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning:torch.*"),
]
VOCABULARY, LENGTH = 23, 10


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def bert(kind="ForMaskedLM", dropout=0.0, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    return getattr(transformers, f"Bert{kind}")(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def sentences(n=6, seed=0):
    """Sequences of different lengths, padded and masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (n,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)  # as tokenizers do; its embedding receives no gradient
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def shifted(logits, labels):
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def aligned(logits, labels):
    return logits.flatten(0, -2), labels.flatten()


class Reference:
    """The plain loop: logits from the model, loss from a criterion module, in one precision."""

    def __init__(self, model, make, arrange=shifted, criterion=None, **options):
        self.model, self.arrange = model, arrange
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.optimizer = make(
            model.parameters(),
            model,
            self.criterion,
            output_fn=lambda result: arrange(result["logits"], torch.zeros(1, 1))[0],
            **options,
        )

    def backward(self, batch, weight=1.0):
        batch = dict(batch)
        labels = batch.pop("labels")
        batch.pop("num_items_in_batch", None)
        outputs, targets = self.arrange(self.model(**batch)["logits"], labels)
        (weight * self.criterion(outputs, targets)).backward()


# Adam divides by the gradient's size, which is rounding where the gradient is zero (keys' biases).
QUIET = {Adler: {}, GaussNewton: {}, AdlerAdam: {"adam_eps": 1e-3}}

# --- a loop of one's own --------------------------------------------------------------------------

LANGUAGE_MODELS = {
    "gpt2": (gpt2, causal_lm, shifted),
    "bert-causal": (lambda: bert("LMHeadModel", is_decoder=True), causal_lm, shifted),
    "bert-masked": (bert, masked_lm, aligned),
    "bert-tokens": (
        lambda: bert("ForTokenClassification", num_labels=VOCABULARY),
        masked_lm,
        aligned,
    ),
}


@pytest.mark.row("Hugging Face model, loss inside", versions=["transformers"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam, GaussNewton])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_one_line_serves_a_model_that_computes_its_loss(name, make):
    build, described, arrange = LANGUAGE_MODELS[name]
    model = build().double()
    optimizer = make(model.parameters(), model, described(), **QUIET[make])
    reference = Reference(build().double(), make, arrange, **QUIET[make])
    for seed in range(3):
        batch = sentences(seed=seed)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        reference.optimizer.zero_grad()
        reference.backward(batch)
        reference.optimizer.step()
    # The models compute this loss in float32 whatever their own precision.
    torch.testing.assert_close(flat(model), flat(reference.model), rtol=1e-5, atol=1e-7)
    ours, theirs = optimizer.last_step, reference.optimizer.last_step
    torch.testing.assert_close(ours.curvature, theirs.curvature, rtol=1e-5, atol=0)
    assert not ours.skipped


@pytest.mark.row("Hugging Face model, loss inside", versions=["transformers"])
@pytest.mark.parametrize(
    ("problem_type", "classes", "criterion", "labels"),
    [
        ("single_label_classification", 3, nn.CrossEntropyLoss, torch.tensor([0, 2, 1, 0, 1, 2])),
        ("multi_label_classification", 3, nn.BCEWithLogitsLoss, torch.eye(6, 3)),
        ("regression", 1, nn.MSELoss, torch.arange(6.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_over_sequences(problem_type, classes, criterion, labels):
    def build():
        options = {"num_labels": classes, "problem_type": problem_type}
        return bert("ForSequenceClassification", **options)

    batch = {**sentences(), "labels": labels}
    arrange = lambda logits, targets: (logits.squeeze(), targets)  # noqa: E731
    reference = Reference(build(), Adler, arrange, criterion())
    model = build()
    optimizer = Adler(model.parameters(), model, sequence_classification(problem_type))
    model(**batch).loss.backward()
    optimizer.step()
    reference.backward(batch)
    reference.optimizer.step()
    torch.testing.assert_close(flat(model), flat(reference.model))
    assert not optimizer.last_step.skipped


@pytest.mark.row("Hugging Face model, loss inside", versions=["transformers"])
def test_an_encoder_decoder_has_aligned_labels():
    model = t5()
    batch = sentences()
    optimizer = Adler(model.parameters(), model, masked_lm())
    model(**batch).loss.backward()
    optimizer.step()
    assert not optimizer.last_step.skipped
    wrong = Adler(model.parameters(), model, causal_lm())
    model(**batch).loss.backward()
    with pytest.raises(RuntimeError, match="shifted by one"):
        wrong.step()


@pytest.mark.row("Hugging Face model, loss inside", versions=["transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_and_low_precision(dtype):
    model = gpt2(dropout=0.3).to(dtype)
    optimizer = AdlerAdam(model.parameters(), model, causal_lm())
    batch = sentences(24)
    first = float(model(**batch).loss.detach())
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert float(model(**batch).loss.detach()) < first - 0.1
    assert int(optimizer.last_step.skipped_total) == 0


# --- the Trainer ----------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    def __init__(self, n, label=None):
        self.batch = sentences(n)
        if label is not None:
            self.batch["labels"] = label(self.batch)

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.batch.items()}


def trainer(model, folder, data=None, optimizers=(None, None), cls_and_kwargs=None, **options):
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "logging_strategy": "no",
        "max_steps": 6,
        **options,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=Sentences(16) if data is None else data,
        optimizers=optimizers,
        optimizer_cls_and_kwargs=cls_and_kwargs,
    )


def recorded_steps(model, optimizer):
    """What the Trainer calls the model with: a list of micro-batches for each step."""
    steps = [[]]

    def record(module, args, kwargs):
        if torch.is_grad_enabled():
            keys = ("input_ids", "attention_mask", "labels", "num_items_in_batch")
            steps[-1].append({key: kwargs[key].clone() for key in keys})

    model.register_forward_pre_hook(record, with_kwargs=True)
    optimizer.register_step_post_hook(lambda *_: steps.append([]))
    return steps


def linear_decay(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_trainer_steps_as_the_plain_loop_in_float64(make, accumulated, tmp_path):
    """Clipping at norm 1, linear decay of ``lr`` and items counted over the micro-batches."""
    model = gpt2().double()
    optimizer = make(model.parameters(), model, causal_lm(), **QUIET[make])
    run = trainer(model, tmp_path, None, (optimizer, None), gradient_accumulation_steps=accumulated)
    steps = recorded_steps(model, optimizer)
    run.train()

    reference = Reference(gpt2().double(), make, **QUIET[make])
    schedule = linear_decay(reference.optimizer, 6)
    *steps, rest = steps
    assert [len(micro) for micro in steps] == ([1] * 6 if accumulated == 1 else [3, 1] * 3)
    for micro in steps:
        for batch in micro:
            count = (batch["labels"][:, 1:] != -100).sum()
            reference.backward(batch, count / batch["num_items_in_batch"])
        nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
        reference.optimizer.step()
        schedule.step()
        reference.optimizer.zero_grad()
    torch.testing.assert_close(flat(model), flat(reference.model), rtol=1e-5, atol=1e-6)
    ours, theirs = optimizer.last_step, reference.optimizer.last_step
    torch.testing.assert_close(ours.curvature, theirs.curvature, rtol=1e-4, atol=0)
    assert not rest


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
def test_a_model_that_ignores_the_items_is_weighted_as_it_is(tmp_path):
    """BertForMaskedLM returns each micro-batch's own mean, whatever the Trainer counts."""
    model = bert()
    optimizer = Adler(model.parameters(), model, masked_lm())
    run = trainer(model, tmp_path, None, (optimizer, None), gradient_accumulation_steps=2)
    steps = recorded_steps(model, optimizer)
    run.train()
    reference = Reference(bert(), Adler, aligned)
    schedule = linear_decay(reference.optimizer, 6)
    for micro in steps[:-1]:
        for batch in micro:
            reference.backward(batch)
        nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
        reference.optimizer.step()
        schedule.step()
        reference.optimizer.zero_grad()
    torch.testing.assert_close(flat(model), flat(reference.model), rtol=1e-4, atol=1e-5)


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
def test_the_trainer_makes_the_optimizer(tmp_path):
    def make(model, **options):
        return AdlerAdam(model.parameters(), model, sequence_classification(), **options)

    model = bert("ForSequenceClassification", num_labels=3)
    data = Sentences(16, lambda batch: batch["input_ids"][:, 0] % 3)
    run = trainer(model, tmp_path, data, cls_and_kwargs=(lambda: make, {"beta": 0.9}))
    run.train()
    optimizer = run.optimizer.optimizer
    assert type(optimizer) is AdlerAdam
    assert optimizer.beta == 0.9
    assert optimizer.param_groups[0]["steps"] == 6
    assert int(optimizer.last_step.skipped_total) == 0


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
@pytest.mark.parametrize("make", [Adler, AdlerAdam])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(make, tmp_path):
    def run(folder, **options):
        model = gpt2(dropout=0.2)
        optimizer = make(model.parameters(), model, causal_lm())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        made = trainer(
            model,
            tmp_path / folder,
            None,
            (optimizer, schedule),
            max_steps=12,
            save_strategy="steps",
            save_steps=5,
        )
        made.train(**options)
        return flat(model), optimizer.state_dict()

    parameters, state = run("whole")
    resumed, resumed_state = run(
        "again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5")
    )
    assert resumed.equal(parameters)
    assert str(resumed_state) == str(state)


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
def test_a_checkpoint_without_evaluation_holds_the_average(tmp_path):
    """And a run that goes on from it ends, bit for bit, where the uninterrupted one does."""

    def run(folder, **options):
        model = gpt2(dropout=0.2)
        optimizer = AdlerScheduleFree(model.parameters(), model, causal_lm())
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        made = trainer(
            model,
            tmp_path / folder,
            None,
            (optimizer, schedule),
            max_steps=12,
            save_strategy="steps",
            save_steps=5,
            eval_strategy="no",
        )
        made.train(**options)
        made.save_model(str(tmp_path / folder / "final"))
        return model, optimizer

    model, optimizer = run("whole")
    trained = flat(model)
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "whole/final")
    optimizer.eval()
    torch.testing.assert_close(flat(saved), flat(model), rtol=0, atol=0)
    assert not flat(model).equal(trained)
    optimizer.train()
    resumed, again = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert flat(resumed).equal(trained)
    assert str(again.state_dict()) == str(optimizer.state_dict())


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
@pytest.mark.parametrize("flag", ["bf16", "no clipping", "activation checkpointing"])
def test_flags_of_the_trainer(flag, tmp_path):
    options = {"bf16": {"bf16": True}, "no clipping": {"max_grad_norm": 0.0}}.get(flag, {})
    model = gpt2(dropout=0.1)
    optimizer = AdlerAdam(model.parameters(), model, causal_lm())
    losses = []
    model.register_forward_hook(lambda *call: losses.append(float(call[-1].loss.detach())))
    run = trainer(model, tmp_path, None, (optimizer, None), max_steps=30, **options)
    if flag == "activation checkpointing":
        model.activation_checkpointing_enable()
    run.train()
    assert optimizer.measure.jvp == "forward"
    assert int(optimizer.last_step.skipped_total) == 0
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
def test_a_loss_that_the_trainer_computes_is_an_error_that_says_what_to_do(tmp_path):
    model = gpt2()
    optimizer = Adler(model.parameters(), model, causal_lm())
    run = trainer(model, tmp_path, None, (optimizer, None), label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match="returned no differentiable scalar as its loss"):
        run.train()


@pytest.mark.row("Hugging Face Trainer", versions=["transformers"])
def test_what_a_step_did_joins_the_trainers_log(tmp_path):
    class LogStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if control.should_log:
                run.log(optimizer.scalars("adler/"))
                control.should_log = True  # which log() takes down

    model = gpt2()
    optimizer = Adler(model.parameters(), model, causal_lm())
    run = trainer(
        model, tmp_path, None, (optimizer, None), logging_strategy="steps", logging_steps=2
    )
    run.add_callback(LogStep)
    run.train()
    entries = [entry for entry in run.state.log_history if "adler/slope" in entry]
    assert len(entries) == sum("loss" in entry for entry in run.state.log_history) == 3
    assert all(math.isfinite(entry["adler/slope"]) for entry in entries)
