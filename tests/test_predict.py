"""From text to answers: `Merged.predict` against transformers' own pipeline, one task at a time, and the command that prints it."""
import io
import json
import sys

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertForQuestionAnswering, BertForTokenClassification,
                          DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification,
                          PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification, pipeline)

from fisher_nodes import Merged, merge, predict
from fisher_nodes.app.cli import main

WORDS = '[PAD] [UNK] [CLS] [SEP] it rains the sun shines on cats dogs It RAINS'.split()
TEXTS = ['it rains', 'the sun shines on cats', 'dogs', 'it shines on the dogs on the cats on the sun', 'it rains', 'no such words at all']
PAIRS = [('it rains', 'the sun'), ('dogs', 'cats on dogs on cats'), ('the sun shines on it', 'it')]

def words(lower=False):
    inner = Tokenizer(WordLevel({o: i for i, o in enumerate(WORDS)}, unk_token='[UNK]'))
    inner.pre_tokenizer = Whitespace()
    if lower: inner.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', model_max_length=16)

SIZE = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, initializer_range=.5, pad_token_id=0)
KINDS = dict(
    bert=lambda n, **kw: BertForSequenceClassification(BertConfig(**SIZE, num_labels=n, **kw)),
    roberta=lambda n, **kw: RobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=n, max_position_embeddings=40, **kw)),
    distilbert=lambda n, **kw: DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=2, n_heads=4, hidden_dim=24, initializer_range=.5, num_labels=n, **kw)),
    gpt2=lambda n, **kw: GPT2ForSequenceClassification(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=4, initializer_range=.5, num_labels=n, pad_token_id=0, **kw)))

def make(kind, n, seed, **kw):
    torch.manual_seed(seed)
    names = {i: f'class {"abcd"[i]}' for i in range(n)}
    return KINDS[kind](n, id2label=names, label2id={v: k for k, v in names.items()}, **kw).eval()

def merged_of(kind, counts=(2, 3), **kw):
    models = {t: make(kind, n, i, **kw) for i, (t, n) in enumerate(zip('xyz', counts))}
    return merge(models, method='average', tokenizer=words())

def alone(model, tokenizer, texts):
    "What transformers says, one text at a time."
    pipe = pipeline('text-classification', model=model, tokenizer=tokenizer)
    return [pipe(t if isinstance(t, str) else dict(text=t[0], text_pair=t[1]), truncation=True) for t in texts]

def plain(found): return [o[0] if isinstance(o, list) else o for o in found]

def same(got, want, rtol=1e-4):
    assert [o['label'] for o in got] == [o['label'] for o in want]
    assert_close([o['score'] for o in got], [o['score'] for o in want], rtol=rtol, atol=0)

@pytest.mark.parametrize('texts', [TEXTS, PAIRS], ids=['texts', 'pairs'])
@pytest.mark.parametrize('kind', KINDS)
def test_as_the_pipeline_of_each_task(kind, texts):
    merged = merged_of(kind)
    for tokens in (None, 8):
        found = merged.predict(texts, batch_tokens=tokens)
        assert list(found) == ['x', 'y']
        for t in merged: same(found[t], plain(alone(merged[t], words(), texts)))
    assert all(len({round(o['score'], 5) for o in found[t]}) > 1 for t in found) # else any order would do

def test_from_its_folder(tmp_path):
    "A folder that transformers loads by itself says the same as the merge that is loaded from there."
    merged_of('bert').save_pretrained(tmp_path/'m')
    found = Merged.from_pretrained(tmp_path/'m').predict(TEXTS)
    for t in 'xy': same(found[t], plain(alone(AutoModelForSequenceClassification.from_pretrained(tmp_path/'m'/t), words(), TEXTS)))

def test_the_body_runs_once():
    merged, calls = merged_of('bert', (2, 3, 2)), []
    handle = merged.body.register_forward_hook(lambda m, a, o: calls.append(len(o[0])))
    merged.predict(TEXTS)
    handle.remove()
    assert sum(calls) == len(TEXTS)

def test_tokenizers_that_differ():
    "Each task reads with its own, in capitals or without."
    models = {t: make('bert', 2, i) for i, t in enumerate('xyz')}
    own = dict(x=words(), y=words(lower=True), z=words())
    own['z'] = own['x']
    shared = merge(models, method='average')
    merged, calls = Merged(shared.body, shared.models, shared.report, own), []
    handle = merged.body.register_forward_hook(lambda m, a, o: calls.append(len(o[0])))
    texts = ['It RAINS', 'It rains on dogs']
    found = merged.predict(texts)
    handle.remove()
    assert sum(calls) == 2*len(texts)
    for t in merged: same(found[t], plain(alone(merged[t], own[t], texts)))
    assert found['y'] != merged.predict(texts, tokenizer=own['x'])['y']

def test_several_labels_and_numbers():
    kinds = dict(x=make('bert', 2, 0), y=make('bert', 4, 1, problem_type='multi_label_classification'), z=make('bert', 1, 2))
    merged = merge(kinds, method='average', tokenizer=words())
    found = merged.predict(TEXTS)
    several = pipeline('text-classification', model=merged['y'], tokenizer=words(), top_k=None)
    for o, text in zip(found['y'], TEXTS):
        want = {a['label']: a['score'] for a in (several([text])[0]) if a['score'] > .5}
        assert set(o['label']) == set(want)
        for name, score in zip(o['label'], o['score']): assert_close(score, want[name], rtol=1e-4, atol=0)
    with torch.no_grad(): want = [merged['z'](**words()(t, return_tensors='pt')).logits.item() for t in TEXTS]
    assert_close([o['value'] for o in found['z']], want, rtol=1e-4, atol=0)

def test_models_come_back_as_they_were():
    merged = merged_of('bert')
    want = merged.predict(TEXTS)
    for m in merged.values(): m.train()
    merged['x'].classifier.eval()
    flags, state = [m.training for o in merged.values() for m in o.modules()], torch.get_rng_state()
    assert merged.predict(TEXTS) == want
    assert [m.training for o in merged.values() for m in o.modules()] == flags and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in merged.body.parameters())

def test_long_texts_are_cut():
    merged = merged_of('bert')
    cut = merged.predict(['it rains on cats on dogs'], max_length=3)
    same(cut['y'], merged.predict(['it rains on'])['y'], rtol=1e-5)

def test_a_task_reads_texts_or_pairs(tmp_path):
    "By the record of its training, or by the recipe; and what nothing is known of reads both."
    for t, columns in (('x', ['premise', 'hypothesis']), ('y', ['review'])):
        make('bert', 2, ord(t)).save_pretrained(tmp_path/t)
        words().save_pretrained(tmp_path/t)
        (tmp_path/t/'finetune.json').write_text(json.dumps(dict(task=dict(text=columns))))
    merge({t: tmp_path/t for t in 'xy'}, method='average').save_pretrained(tmp_path/'m')
    merged = Merged.from_pretrained(tmp_path/'m')
    with pytest.raises(ValueError, match=r"task 'x' reads pairs of texts, and these are single texts; give those, or name others: \['y'\]"): merged.predict(TEXTS)
    with pytest.raises(ValueError, match="task 'y' reads single texts, and these are pairs of texts"): merged.predict(PAIRS)
    same(merged.predict(TEXTS, tasks=['y'])['y'], plain(alone(merged['y'], words(), TEXTS)))
    same(merged.predict(PAIRS, tasks='x')['x'], plain(alone(merged['x'], words(), PAIRS)))
    for recipe, fits in ((dict(data=dict(x='glue:rte', y='glue:mnli')), PAIRS), (dict(text='review'), TEXTS), (dict(text=dict(x=['a', 'b'])), PAIRS), (dict(data=dict(x='rows.csv', y='glue:sst2')), TEXTS)):
        other = merged_of('bert')
        other.recipe = recipe
        other.predict(fits)
        with pytest.raises(ValueError, match='reads'): other.predict(PAIRS if fits is TEXTS else TEXTS)

def test_heads_without_labels_for_texts():
    for cls, say in ((BertForTokenClassification, 'token classifier'), (BertForQuestionAnswering, 'reader of questions')):
        merged = merge({t: cls(BertConfig(**SIZE)) for t in 'xy'}, method='average', tokenizer=words())
        with pytest.raises(ValueError, match=rf"task 'x' \({say}\) gives a text no label and no number"): merged.predict(TEXTS)
    mixed = merge(dict(x=BertForTokenClassification(BertConfig(**SIZE)), y=make('bert', 2, 1)), method='average', tokenizer=words())
    assert list(mixed.predict(TEXTS, tasks=['y'])) == ['y']

@pytest.mark.parametrize('texts, say', [
    ([], 'there are no texts'), (['a', None], 'text 1 is None; expected a text, as the first is'), ([('a', 'b'), 'c'], "text 1 is 'c'; expected a pair"), ([1], 'text 0 is 1'),
    (7, 'expected texts'), (dict(text='a'), 'expected texts')])
def test_what_is_no_text(texts, say):
    with pytest.raises(ValueError, match=say): merged_of('bert').predict(texts)

def test_one_text_and_texts_for_one_model():
    "A single text is a list of one; `predict` of one model takes texts too and gives their logits."
    merged = merged_of('bert')
    assert merged.predict('it rains') == merged.predict(['it rains'])
    got = predict(merged['y'], TEXTS, tokenizer=words())
    assert_close(got, predict(merged['y'], Dataset.from_dict(dict(text=TEXTS)), tokenizer=words()), rtol=0, atol=0)
    with torch.no_grad(): want = torch.cat([merged['y'](**words()(*o, return_tensors='pt')).logits for o in PAIRS])
    assert_close(predict(merged['y'], PAIRS, tokenizer=words()), want, rtol=1e-4, atol=1e-6)


# --- the command ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('predict')
    merged_of('bert').save_pretrained(d/'m')
    make('bert', 2, 5).save_pretrained(d/'one'); words().save_pretrained(d/'one')
    (d/'texts.txt').write_text('\n'.join(TEXTS)+'\n\n')
    (d/'rows.csv').write_text('id,review,label\n'+''.join(f'{i},{o},?\n' for i, o in enumerate(TEXTS)))
    (d/'pairs.tsv').write_text('premise\thypothesis\n'+''.join('\t'.join(o)+'\n' for o in PAIRS))
    return d

def said(capsys, *line):
    assert main([str(o) for o in line]) == 0, capsys.readouterr().err
    return capsys.readouterr().out

def test_texts_from_anywhere(folder, capsys, monkeypatch):
    m, want = folder/'m', Merged.from_pretrained(folder/'m').predict(TEXTS)
    ways = [TEXTS, ['--data', folder/'texts.txt'], ['--data', folder/'rows.csv', '--text', 'review'], ['--tasks', 'x,y', *TEXTS], [TEXTS[0], '--max-length', 16, *TEXTS[1:]], []]
    for more in ways:
        monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(TEXTS)))
        assert json.loads(said(capsys, 'predict', m, *more, '--json')) == dict(texts=TEXTS, answers=want)
    want = Merged.from_pretrained(m).predict(PAIRS)
    for more in (['--pairs', *sum(PAIRS, ())], ['--data', folder/'pairs.tsv'], ['--pairs']):
        monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join('\t'.join(o) for o in PAIRS)))
        assert json.loads(said(capsys, 'predict', m, *more, '--json'))['answers'] == want

def test_a_table_that_fits(folder, capsys):
    out = said(capsys, 'predict', folder/'m', *TEXTS, 'it rains '*40, 'a\x1b[31m\ttab\nand a line').splitlines()
    assert out[0].split() == ['score', 'label', 'task', 'text'] and len(out) == 1+2*8 and max(map(len, out)) <= 80
    assert out[1].startswith('0.') and 'class' in out[1] and '\x1b' not in ''.join(out)

def test_one_model(folder, capsys):
    got = json.loads(said(capsys, 'predict', folder/'one', *TEXTS, '--json'))['answers']
    same(got['one'], plain(alone(AutoModelForSequenceClassification.from_pretrained(folder/'one'), words(), TEXTS)))

MISTAKES = {
    'm': 'there are no texts', 'm it --data rows.csv': 'give texts or --data, not both', 'm it --text review': '--text names columns of --data',
    'm --data none.csv': 'none.csv', 'm --data rows.csv --text nope': "column 'nope' is not there", 'm --data texts.txt --text review': 'texts.txt has none',
    'm --pairs it': '1 texts are no pairs', 'm --data texts.txt --pairs': 'texts.txt: text 0 is no pair', 'm --data rows.csv --pairs': '--pairs is about lines',
    'm it --tasks z': "there is no task 'z'; they are ['x', 'y']", 'one it --tasks x': '--tasks is about a merged model', 'none it': 'cannot load none',
    'm it --max-length 0': "--max-length: expected a whole number of at least 1", 'm it --nope': 'unrecognized arguments: --nope', 'm it --device tpu9': "no device 'tpu9'"}

@pytest.mark.parametrize('line, say', MISTAKES.items())
def test_mistakes(line, say, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
    try: status = main(['predict', *line.split()])
    except SystemExit as e: status = e.code
    text = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
    assert status == 2 and len(text) == 1 and say in text[0], text
