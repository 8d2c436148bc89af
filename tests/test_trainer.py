"""The importance file that a training leaves: the numbers, the model and the training as without it, rows of every kind, places, refusals before the first step, two processes, and sentence-transformers' trainer."""
import json
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import (AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, DataCollatorForLanguageModeling, GPT2Config,
    GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments)

from fisher_nodes import FisherCallback, Grams, MaskFisher, ParameterFisher, mask_fisher, merge
from fisher_nodes.engine.files import OutputExistsError
from fisher_nodes.engine.importance import find_beside
from reference import collate, examples, tiny
from test_cli import WORDS, save_model

QUIET = dict(progress=False)
FILE = 'mask-fisher.safetensors'

class Steps(TrainerCallback):
    "Counts the steps."
    def __init__(self): self.n = 0
    def on_step_end(self, *args, **kwargs): self.n += 1

def dataset(rows): return Dataset.from_dict({k: [r[k] for r in rows] for k in rows[0]})

def trained(folder, callbacks=(), rows=None, model=None, collator=collate, save=True, **kw):
    "A short training; its trainer."
    model = model or tiny(dtype=torch.float32)
    args = dict(per_device_train_batch_size=3, max_steps=4, learning_rate=1e-3, save_strategy='no', logging_strategy='no') | kw
    args = TrainingArguments(str(folder), use_cpu=True, report_to='none', disable_tqdm=True, seed=0, **args)
    trainer = Trainer(model, args, train_dataset=dataset(examples(12)) if rows is None else rows, data_collator=collator, callbacks=list(callbacks))
    trainer.train()
    if save: trainer.save_model()
    return trainer

def same(a, b, rtol=0):
    for kind, layers in b.kinds.items(): assert_close(list(a.kinds[kind]), list(layers), rtol=rtol, atol=0, msg=kind)

def test_a_training_is_as_without_it(tmp_path):
    "Weights, states of the optimizer, gradients, modes and random states, to the bit."
    callback, modes = FisherCallback(num_samples=7), []
    class Looks(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kw): modes.append([torch.get_rng_state(), model.training, [p.grad for p in model.parameters()]])
        def on_train_end(self, args, state, control, model, **kw): modes.append([torch.get_rng_state(), model.training, [p.grad for p in model.parameters()]])
    one, two = trained(tmp_path/'a', [callback, Looks()]), trained(tmp_path/'b', [Looks()])
    for (n, p), q in zip(one.model.named_parameters(), two.model.parameters()):
        assert torch.equal(p, q) and p.requires_grad, n
        assert torch.equal(one.optimizer.state[p]['exp_avg_sq'], two.optimizer.state[q]['exp_avg_sq'])
    with_it, without = modes[:2], modes[2:]
    for a, b in zip(with_it, without):
        assert torch.equal(a[0], b[0]) and a[1]==b[1]
        assert all(g is None and h is None or torch.equal(g, h) for g, h in zip(a[2], b[2]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())

@pytest.mark.parametrize('statistic, kind', [('mask-fisher', MaskFisher), ('full-fisher', ParameterFisher), ('grams', Grams)])
def test_it_lies_beside_the_model(statistic, kind, tmp_path):
    callback = FisherCallback(statistic=statistic, num_samples=7, seed=3)
    trainer = trained(tmp_path, [callback])
    path = find_beside('a', tmp_path, statistic)
    found, again = kind.load(path), callback.measure(trainer.model, dataset(examples(12)), num_samples=7, seed=3, **QUIET)
    assert found.num_examples==7 and found.meta['weight_hash']==again.meta['weight_hash']
    assert_close(found.tensors(), again.tensors(), rtol=0, atol=0)

def test_a_merge_takes_it(tmp_path):
    for i, t in enumerate('ab'): trained(tmp_path/t, [FisherCallback(num_samples=6)], rows=dataset(examples(12, seed=i)))
    merged = merge({t: str(tmp_path/t) for t in 'ab'}, 'beside', **QUIET)
    fishers = {t: mask_fisher(str(tmp_path/t), dataset(examples(12, seed=i)), num_samples=6, **QUIET) for i, t in enumerate('ab')}
    want = merge({t: str(tmp_path/t) for t in 'ab'}, fishers, **QUIET)
    assert all(torch.equal(p, q) for p, q in zip(merged.body.parameters(), want.body.parameters()))

def test_rows_of_another_kind_go_through_the_collator(tmp_path):
    "A list of rows, which no `Dataset` is; the same sample as of a `Dataset`."
    callback = FisherCallback(num_samples=7, seed=1)
    trainer = trained(tmp_path, [callback], rows=examples(12))
    same(callback.fisher, mask_fisher(trainer.model, dataset(examples(12)), num_samples=7, seed=1, **QUIET), rtol=1e-4)
    assert callback.fisher.num_examples==7

def test_a_collator_that_draws_leaves_training_alone(tmp_path):
    def noisy(rows):
        batch = collate(rows)
        return batch | dict(input_ids=torch.where(torch.rand(batch['input_ids'].shape)<.2, 5, batch['input_ids']))
    one, two = (trained(tmp_path/t, c, rows=examples(12), collator=noisy) for t, c in (('a', [FisherCallback(num_samples=5)]), ('b', [])))
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters()))


# --- rows and collators with states of their own, and labels that a collator makes -------------

LETTERS = dict(vocab_size=len(WORDS)+1, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)

@pytest.fixture(scope='module')
def masked(tmp_path_factory):
    "A tokenizer with a mask, and rows of tokens without labels, short and long."
    place = tmp_path_factory.mktemp('masked')
    save_model(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_special_tokens(dict(mask_token='[MASK]'))
    def row(i, n): return dict(input_ids=[3+(i*j) % (len(WORDS)-3) for j in range(1, n+1)], attention_mask=[1]*n)
    return tokenizer, [row(i, 12) for i in range(10)]+[row(i, 4) for i in range(10, 16)]

def language_model(kind=BertForMaskedLM):
    torch.manual_seed(0)
    return kind(BertConfig(**LETTERS) if kind is BertForMaskedLM else GPT2Config(vocab_size=len(WORDS)+1, n_embd=16, n_layer=2, n_head=4, n_positions=16))

class Counted(torch.utils.data.Dataset):
    "Rows that are others each time that one is read."
    def __init__(self, rows): self.rows, self.n = rows, 0
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        self.n += 1
        row = self.rows[i]
        return row | dict(input_ids=[*row['input_ids'][:-1], 3+self.n % 7])

@pytest.mark.parametrize('kind', ['seed', 'seed, a Dataset', 'counter', 'a transform that counts'])
@pytest.mark.filterwarnings('ignore:.*training rows have no label')
def test_states_of_rows_and_collator_are_left_alone(kind, masked, tmp_path):
    tokenizer, given = masked
    def one(name, callbacks):
        if kind == 'counter': model, rows, collator = language_model(GPT2LMHeadModel), Counted(given), DataCollatorForLanguageModeling(tokenizer, mlm=False)
        elif kind == 'a transform that counts':
            model, collator, count = tiny(dtype=torch.float32), collate, Counted(examples(12))
            rows = dataset(examples(12)).with_transform(Each(count))
        else: model, rows, collator = language_model(), dataset(given) if 'Dataset' in kind else Counted(given), DataCollatorForLanguageModeling(tokenizer, mlm_probability=.5, seed=3)
        trainer = trained(tmp_path/name, callbacks, rows=rows, model=model, collator=collator, save=False, remove_unused_columns=kind != 'a transform that counts')
        return trainer, rows, collator
    callback = FisherCallback(num_samples=7)
    (one_, rows, collator), (two, others, other) = one('a', [callback]), one('b', [])
    for (n, p), q in zip(one_.model.named_parameters(), two.model.parameters()): assert torch.equal(p, q), n
    if isinstance(rows, Counted): assert rows.n == others.n >= 12
    if 'seed' in kind: assert torch.equal(collator.generator.get_state(), other.generator.get_state())
    assert callback.fisher.num_examples and callback.fisher.heads.max()>0

class Each:
    "A transform of a batch, with a count of its own."
    def __init__(self, rows): self.rows = rows
    def __call__(self, batch):
        self.rows.n += 1
        return batch | dict(input_ids=[[*o[:-1], 3+self.rows.n % 7] for o in batch['input_ids']])

def test_a_second_training_goes_on_with_the_collators_state(masked, tmp_path):
    "After the first the collator has a generator, which is copied too."
    tokenizer, given = masked
    def one(callbacks):
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=.5, seed=3)
        return [trained(tmp_path/'o', callbacks, rows=dataset(given[:10]), model=language_model(), collator=collator, save=False).model for _ in range(2)]
    a, b = one([FisherCallback(num_samples=5)]), one([])
    for m, o in zip(a, b): assert all(torch.equal(p, q) for p, q in zip(m.parameters(), o.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(a[0].parameters(), a[1].parameters()))

def test_a_model_in_the_collator_is_not_copied(tmp_path):
    class Holds:
        def __init__(self, model): self.model = model
        def __call__(self, rows):
            assert self.model is model
            return collate(rows)
    model = tiny(dtype=torch.float32)
    trained(tmp_path, [FisherCallback(num_samples=5)], rows=examples(12), model=model, collator=Holds(model))
    assert find_beside('a', tmp_path)

def test_rows_without_a_chosen_token_are_left_out(tmp_path):
    "By hand: the numbers are those of the rows that are left, and the message counts the others."
    numbers = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:7].tolist()
    rows = [dict(input_ids=[3+(i*j) % 8 for j in range(1, 7)], at=i) for i in range(12)]
    out = {*numbers[:2], numbers[5]}
    def hides(batch):
        ids = torch.tensor([o['input_ids'] for o in batch])
        labels = torch.full_like(ids, -100)
        for i, o in enumerate(batch): labels[i, 2] = -100 if o['at'] in out else ids[i, 2]
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    for data in (rows, dataset(rows)):
        callback = FisherCallback(num_samples=7)
        with pytest.warns(UserWarning, match='3 of 7 training rows have no label but -100; they are left out'):
            trainer = trained(tmp_path/'a', [callback], rows=data, model=language_model(), collator=hides, remove_unused_columns=False)
        kept = hides([rows[i] for i in numbers if i not in out])
        same(callback.fisher, mask_fisher(trainer.model, [kept], **QUIET), rtol=1e-5)
        assert callback.fisher.num_examples == 4
    out, steps = {*range(12)}, Steps()
    with pytest.raises(ValueError, match='none of 7 training rows has a label but -100; give rows with labels as `data`'):
        trained(tmp_path/'b', [FisherCallback(num_samples=7), steps], rows=rows, model=language_model(), collator=hides, remove_unused_columns=False)
    assert not steps.n

def test_labels_that_a_collator_renames(tmp_path):
    rows, callback = dataset(examples(12)).rename_column('labels', 'target'), FisherCallback(num_samples=7)
    def named(batch): return collate([o | dict(labels=o['target']) for o in batch])
    trainer = trained(tmp_path, [callback], rows=rows, collator=named, remove_unused_columns=False)
    same(callback.fisher, mask_fisher(trainer.model, dataset(examples(12)), num_samples=7, **QUIET), rtol=1e-4)

def test_a_dataset_with_labels_needs_no_collator(tmp_path):
    "It is read as it is, and the collator is neither run nor copied."
    class Fixed:
        def __deepcopy__(self, memo): raise TypeError('not to be copied')
        def __call__(self, rows): return collate(rows)
    trained(tmp_path, [FisherCallback(num_samples=5)], collator=Fixed())
    assert find_beside('a', tmp_path)

def test_other_rows_and_options(tmp_path):
    rows, batches = dataset(examples(5, seed=9)), [collate(examples(3, seed=8))]
    for data, num, more in ((rows, 4, dict(labels='exact')), (batches, 3, {}), (batches, 3, dict(loss=lambda m, b: m(b['input_ids']).logits.square().sum(1)))):
        callback = FisherCallback(tmp_path/'f.safetensors', data=data, num_samples=num, **more)
        trainer = trained(tmp_path/'out', [callback])
        want = mask_fisher(trainer.model, data, num_samples=num, **more, **QUIET)
        same(MaskFisher.load(tmp_path/'f.safetensors'), want)
    assert not (tmp_path/'out'/FILE).exists()

def test_raw_text_is_read_with_the_trainers_tokenizer(tmp_path):
    save_model(tmp_path/'start')
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path/'start'), AutoTokenizer.from_pretrained(tmp_path/'start')
    rows = Dataset.from_dict(dict(text=[' '.join(WORDS[4+(i*j) % 8] for j in range(1, 3+i % 4)) for i in range(12)], label=[0, 1]*6))
    def read(batch): return dict(tokenizer([o['text'] for o in batch], padding=True, return_tensors='pt'), labels=torch.tensor([o['label'] for o in batch]))
    callback = FisherCallback(num_samples=6)
    args = TrainingArguments(str(tmp_path/'out'), use_cpu=True, report_to='none', disable_tqdm=True, max_steps=2, save_strategy='no', remove_unused_columns=False)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=read, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    same(callback.fisher, mask_fisher(model, rows, tokenizer=tokenizer, num_samples=6, **QUIET))

@pytest.mark.parametrize('precision', ['bf16'])
def test_mixed_precision_is_not_measured(precision, tmp_path):
    "The numbers of the saved weights in their own precision; under `autocast` they would be others."
    callback = FisherCallback(num_samples=7)
    trainer = trained(tmp_path, [callback], bf16=True)
    same(callback.fisher, mask_fisher(str(tmp_path), dataset(examples(12)), num_samples=7, **QUIET), rtol=1e-4)
    with torch.autocast('cpu', torch.bfloat16): blurred = mask_fisher(str(tmp_path), dataset(examples(12)), num_samples=7, **QUIET)
    assert (blurred.heads/callback.fisher.heads-1).abs().max()>1e-3
    assert '_original_forward' not in vars(trainer.model) or trainer.model.forward is not trainer.model._original_forward

def test_the_best_model_is_measured(tmp_path):
    "Where `Trainer` goes back to the best checkpoint, which is what it saves."
    callback = FisherCallback(num_samples=7)
    more = dict(eval_strategy='steps', eval_steps=1, save_strategy='steps', save_steps=1, load_best_model_at_end=True, learning_rate=.5)
    model = tiny(dtype=torch.float32)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to='none', disable_tqdm=True, max_steps=3, **more)
    trainer = Trainer(model, args, train_dataset=dataset(examples(12)), eval_dataset=dataset(examples(12)), data_collator=collate, callbacks=[callback])
    trainer.train()
    trainer.save_model()
    assert trainer.state.best_global_step<3
    assert find_beside('a', tmp_path) and mask_fisher(str(tmp_path), dataset(examples(3)), **QUIET).meta['weight_hash']==callback.fisher.meta['weight_hash']


# --- places -----------------------------------------------------------------------------------

def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def cut(tensors, path, about):
        Path(path).write_bytes(b'half')
        raise OSError('no space left')
    monkeypatch.setattr('fisher_nodes.engine.measure.save_file', cut)
    with pytest.raises(OSError, match='no space left'): trained(tmp_path/'out', [FisherCallback(num_samples=4)])
    assert not [o for o in (tmp_path/'out').rglob('*') if FILE in o.name]

def test_an_earlier_file_is_replaced_and_another_is_not(tmp_path):
    trained(tmp_path/'out', [FisherCallback(num_samples=4)])
    trained(tmp_path/'out', [FisherCallback(num_samples=5)])
    assert MaskFisher.load(tmp_path/'out'/FILE).num_examples==5
    (tmp_path/'mine').write_text('mine')
    for out, error, says in ((tmp_path/'mine', OutputExistsError, 'is no earlier file'), (tmp_path, OutputExistsError, 'is a folder'),
            (tmp_path/'none'/'f.safetensors', FileNotFoundError, 'is not a folder')):
        steps = Steps()
        with pytest.raises(error, match=says): trained(tmp_path/'other', [FisherCallback(out), steps])
        assert not steps.n
    assert (tmp_path/'mine').read_text()=='mine' and not (tmp_path/'none').exists()

def test_nothing_is_written_where_training_fails(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, *args, **kwargs): raise RuntimeError('stopped')
    with pytest.raises(RuntimeError, match='stopped'): trained(tmp_path/'out', [FisherCallback(num_samples=4), Stops()])
    assert not (tmp_path/'out'/FILE).exists()


# --- refusals before the first step -----------------------------------------------------------

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(examples(12))

class Locked(Counted):
    def __init__(self, rows):
        super().__init__(rows)
        self.lock = threading.Lock()

LATE = examples(12)[:-1]+[examples(12)[-1] | dict(labels=7)] # one row of all is wrong
REFUSED = {
    'a label too many, in one row': (dict(rows=dataset(LATE)), {}, ValueError, 'row 11.*7|7.*row 11'),
    'the same through the collator': (dict(rows=LATE), {}, ValueError, 'label.*7|7.*label'),
    'no labels': (dict(rows=dataset([{k: v for k, v in o.items() if k!='labels'} for o in examples(12)])), {}, ValueError, 'label'),
    'rows that cannot be copied': (dict(rows=Locked(examples(12))), {}, ValueError, r"a Locked, or its collator cannot be copied \(.*lock.*\), .*; give some of its rows as `data`"),
    'a stream': (dict(rows=Stream()), {}, ValueError, 'the training set is a Stream, of which no sample can be drawn'),
    'a model without a head': (dict(model=BertModel(tiny().config)), {}, ValueError, 'labels'),
    'a loss that is none': ({}, dict(loss='bce'), ValueError, 'bce'),
    'a loss of one number': ({}, dict(loss=lambda m, b: m(**b).loss), ValueError, 'shape'),
    'deepspeed': ({}, {}, ValueError, 'with `deepspeed` no process has all weights')}

@pytest.mark.parametrize('what', REFUSED)
def test_refused_before_training(what, tmp_path):
    given, options, error, says = REFUSED[what]
    callback, steps = FisherCallback(num_samples=12, **options), Steps()
    if what=='deepspeed':
        begin = callback.on_train_begin
        class Args: deepspeed, output_dir = 'x.json', str(tmp_path)
        callback.on_train_begin = lambda args, *a, **kw: begin(Args, *a, **kw)
    with pytest.raises(error, match=says) as e: trained(tmp_path, [callback, steps], **given)
    assert not steps.n and '\n' not in str(e.value) and not (tmp_path/FILE).exists()

@pytest.mark.parametrize('given, error, says', [
    (dict(num_samples=0), ValueError, 'num_samples'), (dict(statistic='fisher'), ValueError, 'expected one of'), (dict(lables='exact'), TypeError, 'lables'),
    (dict(data=iter([])), ValueError, 'expected a Dataset or a list'), (dict(statistic='grams', labels='exact'), TypeError, 'labels'), (dict(out=3), ValueError, '`out`')])
def test_refused_when_it_is_made(given, error, says):
    with pytest.raises(error, match=says): FisherCallback(**given)

@pytest.mark.parametrize('how', ['around', 'inside'])
def test_an_adapter_is_refused(how, tmp_path):
    from peft import LoraConfig, get_peft_model
    model, config = tiny(dtype=torch.float32), LoraConfig(target_modules=['query'], task_type='SEQ_CLS')
    if how=='around': model = get_peft_model(model, config)
    else: model.add_adapter(config)
    steps = Steps()
    with pytest.raises(ValueError, match='an adapter of PEFT is trained; merge it afterwards'): trained(tmp_path, [FisherCallback(num_samples=4), steps], model=model)
    assert not steps.n


# --- several processes ------------------------------------------------------------------------

def test_two_processes(tmp_path):
    "One file, of the same numbers as one process finds; a place that cannot be is an error in both."
    from test_processes import torchrun
    code, said = torchrun(2, 'test_trainer.py', tmp_path)
    assert code==0, said[-3000:]
    found = MaskFisher.load(tmp_path/'out'/FILE)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path/'out')
    same(found, mask_fisher(model, dataset(examples(12)), num_samples=7, **QUIET), rtol=1e-5)
    for i in range(2):
        says, steps = json.loads((tmp_path/f'{i}.json').read_text())
        assert 'is no earlier file' in says and steps==0

def in_a_process(folder):
    "What each process of the launch does."
    trained(folder/'out', [FisherCallback(num_samples=7)], ddp_backend='gloo')
    steps = Steps()
    (folder/'mine').write_text('mine')
    try: trained(folder/'other', [FisherCallback(folder/'mine'), steps], ddp_backend='gloo')
    except Exception as e: (folder/f'{os.environ["RANK"]}.json').write_text(json.dumps([str(e), steps.n]))


# --- sentence-transformers --------------------------------------------------------------------

needs_them = pytest.mark.skipif(find_spec('sentence_transformers') is None, reason='sentence_transformers not installed; `make plugins` makes an environment with it')

def cross_training(folder, name, callbacks=(), **more):
    "Their trainer after three steps on twelve pairs, from a start that is made once."
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    if not (folder/'start').exists(): save_model(folder/'start', num_labels=1)
    texts = [' '.join(WORDS[4+(i*j) % 8] for j in range(1, 3+i % 4)) for i in range(13)]
    rows = Dataset.from_dict(dict(query=texts[:12], answer=texts[1:], label=[0., 1.]*6))
    torch.manual_seed(0)
    model = CrossEncoder(str(folder/'start'), num_labels=1, device='cpu')
    args = CrossEncoderTrainingArguments(str(folder/name), use_cpu=True, report_to='none', disable_tqdm=True, max_steps=3, per_device_train_batch_size=4, seed=0, **more)
    trainer = CrossEncoderTrainer(model, args, train_dataset=rows, callbacks=[*callbacks])
    trainer.train()
    return trainer, model, rows

@needs_them
def test_the_cross_encoder_trainer(tmp_path):
    "Their trainer with our callback: the file is that of the model inside, and a training is as without it."
    callback = FisherCallback(num_samples=8, loss='bce', text=['query', 'answer'])
    _, with_it, rows = cross_training(tmp_path, 'with', [callback], save_strategy='no')
    _, without, _ = cross_training(tmp_path, 'without', save_strategy='no')
    for (n, p), q in zip(with_it.named_parameters(), without.parameters()): assert torch.equal(p, q), n
    found = MaskFisher.load(tmp_path/'with'/FILE)
    want = mask_fisher(with_it.model, rows, tokenizer=with_it.tokenizer, num_samples=8, loss='bce', text=['query', 'answer'], **QUIET)
    same(found, want)
    assert found.heads.max()>0

@needs_them
def test_what_a_cross_encoders_optimizer_kept(tmp_path):
    "Their trainer groups as transformers' does, so the states are found; each by the parameter itself."
    from fisher_nodes import optimizer_fisher
    trainer, model, _ = cross_training(tmp_path, 'out', save_steps=3)
    found = optimizer_fisher(tmp_path/'out'/'checkpoint-3')
    state = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, 'optimizer') else trainer.optimizer.state
    for n, p in model.model.bert.named_parameters(): assert_close(found.values[n], state[p]['exp_avg_sq']/(1-.999**3), rtol=1e-5, atol=0, msg=n)

if __name__=='__main__': in_a_process(Path(sys.argv[1]))
