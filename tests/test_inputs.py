"""Inputs are read as they are meant, or refused: every kind with several examples, each against a slow reference.

Kinds: which columns are the text, whose classes, what is read of a file, which tokenizer, masks and ids,
which code runs, what stays as it was, what is iterated, what threads share, and where."""
import functools
import gzip
import json
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset, Value
from fisher_nodes import Merged, evaluate, finetune, linear_grams, mask_fisher, merge, parameter_fisher, predict
from fisher_nodes.app.cli import main
from fisher_nodes.engine.models import head_tensors
from fisher_nodes.merging.run import merge_files
from fisher_nodes.engine.tables import read_table
from fisher_nodes.tasks.tasks import Task, load_rows, load_task, text_rows
from reference import brute_mask_fisher, collate, examples, tiny
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, RobertaConfig, RobertaForSequenceClassification

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'it', 'rains', 'is', 'wet', 'dry', 'a', 'cat', 'sat', 'yes', 'no', 'the', 'The', 'Cat']
NLI = ('contradiction', 'entailment', 'neutral')
PREMISES = ['it rains', 'a cat sat', 'the cat is wet', 'it is dry', 'a cat rains']
HYPOTHESES = ['it is wet', 'it is dry', 'a cat', 'no', 'the cat sat']
LABELS = [1, 2, 1, 0, 2]

def tokenizer(folder, lower=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'vocab.txt').write_text('\n'.join(WORDS))
    return BertTokenizerFast(str(folder/'vocab.txt'), do_lower_case=lower)

def named(names=NLI, seed=0, **kw):
    model = tiny(num_labels=len(names), seed=seed, **kw)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {o: i for i, o in enumerate(names)}
    return model

def saved(folder, model, lower=True):
    model.save_pretrained(folder)
    tokenizer(folder, lower).save_pretrained(folder)
    return folder

def read(tok, *columns, labels=LABELS):
    "Batches of one row each, made by hand."
    rows = [tok(*texts) for texts in zip(*columns)]
    return [{k: torch.tensor([v]) for k, v in row.items()} | dict(labels=torch.tensor([y])) for row, y in zip(rows, labels)]

def heads_of(model, batches): return brute_mask_fisher(model, batches)[0]

def same(fisher, want): assert_close(fisher.heads, want, rtol=1e-9, atol=0)


# --- which columns are the text ---------------------------------------------------------------

LABEL_WORDS = [NLI[i] for i in LABELS]

@pytest.mark.parametrize('columns, text', [
    (dict(text=PREMISES, label_text=LABEL_WORDS), ['text']),
    (dict(answer_name=LABEL_WORDS, review=PREMISES), ['review']),
    (dict(hypothesis=HYPOTHESES, premise=PREMISES), ['premise', 'hypothesis']),
    (dict(sentence2=HYPOTHESES, explanation=PREMISES, sentence1=PREMISES), ['sentence1', 'sentence2']),
    (dict(Text_B=HYPOTHESES, Text_A=PREMISES, author=PREMISES), ['Text_A', 'Text_B']),
    (dict(passage=HYPOTHESES, question=PREMISES), ['question', 'passage'])])
def test_text_is_known_by_name_and_a_label_is_never_text(tmp_path, columns, text):
    model, tok = tiny(), tokenizer(tmp_path)
    want = heads_of(model, read(tok, *(columns[c] for c in text)))
    rows = Dataset.from_dict(columns | dict(label=LABELS))
    same(mask_fisher(model, rows, tokenizer=tok), want)
    rows.to_csv(tmp_path/'rows.csv')
    found, task = load_task(tmp_path/'rows.csv')
    assert task.text == tuple(text)
    same(mask_fisher(model, found, tokenizer=tok), want)

@pytest.mark.parametrize('columns', [('headline', 'story'), ('title', 'text'), ('text', 'question'), ('a', 'b', 'c')])
def test_text_that_no_name_tells_is_asked_for(tmp_path, columns):
    texts = dict(zip(columns, (PREMISES, HYPOTHESES, PREMISES[::-1])))
    model, tok, rows = tiny(), tokenizer(tmp_path), Dataset.from_dict(texts | dict(label=LABELS))
    with pytest.raises(ValueError, match=r'not clear which columns are the text, among .*text='): mask_fisher(model, rows, tokenizer=tok)
    rows.to_csv(tmp_path/'rows.csv')
    with pytest.raises(ValueError, match=r'rows.csv: it is not clear.*--text'): load_task(tmp_path/'rows.csv')
    first, second = columns[:2]
    for text in ([first], [second, first]):
        want = heads_of(model, read(tok, *(texts[c] for c in text)))
        same(mask_fisher(model, rows, tokenizer=tok, text=text), want)
        data, task = load_task(tmp_path/'rows.csv', text=text)
        same(mask_fisher(model, data, tokenizer=tok, text=task.text), want)

def test_text_that_was_fine_tuned_on_is_recorded(tmp_path):
    tok = tokenizer(tmp_path/'tok')
    rows = Dataset.from_dict(dict(headline=HYPOTHESES, story=PREMISES, label=LABELS))
    finetune(tiny(dtype=torch.float32), rows, text=['story', 'headline'], tokenizer=tok, out=tmp_path/'m', epochs=.2, progress=False)
    rows.to_csv(tmp_path/'rows.csv')
    data, task = load_rows(tmp_path/'rows.csv', tmp_path/'m')
    assert task.text == ('story', 'headline')
    by_name = mask_fisher(tmp_path/'m', rows)
    same(mask_fisher(tmp_path/'m', rows, text=['story', 'headline']), by_name.heads)
    assert main(['fisher', str(tmp_path/'m'), '--data', str(tmp_path/'rows.csv'), '--out', str(tmp_path/'f.safetensors')]) == 0
    same(type(by_name).load(tmp_path/'f.safetensors'), by_name.heads)

def test_numbers_are_not_text(tmp_path):
    (tmp_path/'n.csv').write_text('text,label\n2023,0\n1999,1\n')
    with pytest.raises(ValueError, match="n.csv: column 'text' is int64; expected text"): load_task(tmp_path/'n.csv')
    (tmp_path/'n.jsonl').write_text('{"sentence": 5, "label": 0}\n{"sentence": 6, "label": 1}\n')
    with pytest.raises(ValueError, match="column 'sentence' is int64; expected text"): load_task(tmp_path/'n.jsonl')
    rows = Dataset.from_dict(dict(text=['it rains', None], label=[0, 1]))
    with pytest.raises(ValueError, match="column 'text' is empty in row 1"): mask_fisher(tiny(), rows, tokenizer=tokenizer(tmp_path))

def test_the_shell_takes_columns(tmp_path, capsys):
    m = saved(tmp_path/'m', tiny(dtype=torch.float32))
    Dataset.from_dict(dict(headline=HYPOTHESES, story=PREMISES, mood=LABELS)).to_csv(tmp_path/'rows.csv')
    spec, out = str(tmp_path/'rows.csv'), str(tmp_path/'f.safetensors')
    assert main(['fisher', str(m), '--data', spec, '--out', out]) == 2
    assert '--label' in capsys.readouterr().err
    assert main(['fisher', str(m), '--data', spec, '--label', 'mood', '--text', 'story,headline', '--out', out]) == 0
    model = tiny(dtype=torch.float32)
    want = heads_of(model, read(tokenizer(tmp_path), PREMISES, HYPOTHESES))
    from fisher_nodes import MaskFisher
    assert_close(MaskFisher.load(out).heads.double(), want, rtol=1e-3, atol=0)
    pairs = dict(a=str(m), b=str(saved(tmp_path/'n', tiny(dtype=torch.float32, seed=1))))
    words = [f'{k}={v}' for k, v in pairs.items()]
    line = ['merge', *words, '--data', f'a={spec}', f'b={spec}', '--label', 'mood', '--text', 'a=story,headline', 'b=story', '--out', str(tmp_path/'both')]
    assert main(line) == 0
    assert main(['merge', str(tmp_path/'both'/'recipe.yml'), '--out', str(tmp_path/'again')]) == 0
    assert main(['evaluate', str(tmp_path/'both'), '--data', f'a={spec}', f'b={spec}', '--label', 'mood', '--text', 'story']) == 0
    assert main([*line[:-1], str(tmp_path/'c'), '--text', 'c=story']) == 2
    assert "names 'c', which is no task" in capsys.readouterr().err


@pytest.mark.parametrize('columns', [dict(question=PREMISES, answer=[1, 2, 3, 4, 5]), dict(sentence1=PREMISES, sentence2=[1, 2, 3, 4, 5]), dict(Text=[1, 2, 3, 4, 5], author=PREMISES), dict(text=PREMISES, Text=HYPOTHESES, TEXT=PREMISES[::-1], title=PREMISES)])
def test_half_a_pair_is_not_dropped(tmp_path, columns):
    rows = Dataset.from_dict(columns | dict(label=LABELS))
    with pytest.raises(ValueError, match='expected text|not clear'): mask_fisher(tiny(), rows, tokenizer=tokenizer(tmp_path))

def test_names_of_one_spelling_and_pairs_of_the_tokenizer(tmp_path):
    model, tok = tiny(), tokenizer(tmp_path)
    rows = Dataset.from_dict(dict(text_pair=HYPOTHESES, text=PREMISES, url=PREMISES, label=LABELS))
    same(mask_fisher(model, rows, tokenizer=tok), heads_of(model, read(tok, PREMISES, HYPOTHESES)))
    rows = Dataset.from_dict(dict(Text=HYPOTHESES, text=PREMISES, label=LABELS))
    same(mask_fisher(model, rows, tokenizer=tok), heads_of(model, read(tok, PREMISES)))

def test_the_order_of_a_recorded_pair_survives_merging(tmp_path):
    rows = Dataset.from_dict(dict(hypothesis=HYPOTHESES, premise=PREMISES, label=LABELS))
    tok = tokenizer(tmp_path/'tok')
    for t in 'ab': finetune(tiny(dtype=torch.float32), rows, text=['hypothesis', 'premise'], tokenizer=tok, out=tmp_path/t, epochs=.2, progress=False)
    merge_files(dict(a=tmp_path/'a', b=tmp_path/'b'), method='average', out=tmp_path/'both')
    found = mask_fisher(tmp_path/'both'/'a', rows).heads
    assert torch.equal(found, mask_fisher(tmp_path/'both'/'a', rows, text=['hypothesis', 'premise']).heads)
    assert not torch.equal(found, mask_fisher(tmp_path/'both'/'a', rows, text=['premise', 'hypothesis']).heads)


# --- whose classes ----------------------------------------------------------------------------

def classes(names, labels=LABELS): return Dataset.from_list(examples(len(labels))).remove_columns('labels').add_column('label', labels).cast_column('label', ClassLabel(names=list(names)))

@pytest.mark.parametrize('names', [('entailment', 'neutral', 'contradiction'), ('Neutral', 'Contradiction', 'Entailment'), NLI])
def test_classes_are_matched_by_name(names):
    model, rows = named(), classes(names)
    meant = [NLI.index(names[y].lower()) for y in LABELS]
    by_hand = [collate([o | dict(labels=y)]) for o, y in zip(examples(len(meant)), meant)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        got = mask_fisher(model, rows)
    same(got, heads_of(model, by_hand))
    assert any('matched by name' in str(o.message) for o in said) == (names != NLI)
    with torch.no_grad(): right = [int(model(**{k: v for k, v in b.items() if k != 'labels'}).logits.argmax()) == int(b['labels']) for b in by_hand]
    for task in (None, Task('nli', (), tuple(o.lower() for o in names))):
        assert evaluate(model, rows, task)['accuracy'] == sum(right)/len(right)
    assert_close(parameter_fisher(model, rows).values['embeddings.word_embeddings.weight'],
                 parameter_fisher(model, by_hand).values['embeddings.word_embeddings.weight'], rtol=1e-9, atol=0)

def test_f1_counts_the_class_that_the_task_means():
    "The second class of MRPC is the positive one, wherever the head has it."
    names = ('equivalent', 'not_equivalent')
    model, glue = named(names), ('not_equivalent', 'equivalent')
    rows = classes(glue, [0, 1, 1, 0, 1])
    with torch.no_grad(): answers = [names[int(model(input_ids=torch.tensor([o['input_ids']])).logits.argmax())] for o in examples(5)]
    truth = [glue[y] for y in rows['label'][:]]
    hits = sum(a == t == 'equivalent' for a, t in zip(answers, truth))
    f1 = 2*hits/(answers.count('equivalent')+truth.count('equivalent'))
    assert evaluate(model, rows, 'mrpc')['f1'] == pytest.approx(f1, rel=1e-12)
    plain = rows.cast_column('label', Value('int64'))
    with pytest.raises(ValueError, match='numbers without names'): evaluate(model, plain, 'mrpc')

@pytest.mark.parametrize('names, why', [(('neg', 'pos', 'mixed'), "the model has no 'neg'"), (('0', '1'), '2 classes for 3 outputs'), (('entailment', 'not_entailment'), "no 'not_entailment'")])
def test_other_classes_are_refused(names, why):
    for run in (mask_fisher, parameter_fisher, evaluate):
        with pytest.raises(ValueError, match=why): run(named(), classes(names, [0, 1, 1]))
    with pytest.raises(ValueError, match=f"data of 'a': .*{why}"): merge(dict(a=named(), b=named(seed=1)), data=dict(a=classes(names, [0, 1, 1]), b=classes(NLI)))

def test_a_number_is_no_class():
    with pytest.raises(ValueError, match='it predicts a number'): mask_fisher(tiny(num_labels=1), classes(('no', 'yes'), [0, 1, 1]))

def test_stored_names_are_not_overwritten(tmp_path):
    "A parquet file of datasets has its own names, in another order than the model."
    model = named()
    rows = Dataset.from_dict(dict(text=PREMISES, label=LABELS)).cast_column('label', ClassLabel(names=['entailment', 'neutral', 'contradiction']))
    rows.to_parquet(tmp_path/'rows.parquet')
    data, _ = load_rows(tmp_path/'rows.parquet', model)
    tok = tokenizer(tmp_path)
    same(mask_fisher(model, data, tokenizer=tok), heads_of(model, read(tok, PREMISES, labels=[(y+1)%3 for y in LABELS])))

def test_words_need_names(tmp_path):
    rows = dict(text=PREMISES, label=[('spam', 'ham')[y%2] for y in LABELS])
    Dataset.from_dict(rows).to_csv(tmp_path/'rows.csv')
    with pytest.raises(ValueError, match="label 'ham' is not among"): load_rows(tmp_path/'rows.csv', tiny(num_labels=2))
    model, tok = named(('spam', 'ham')), tokenizer(tmp_path)
    want = heads_of(model, read(tok, PREMISES, labels=[y%2 for y in LABELS]))
    same(mask_fisher(model, load_rows(tmp_path/'rows.csv', model)[0], tokenizer=tok), want)
    same(mask_fisher(model, Dataset.from_dict(rows), tokenizer=tok), want)
    numbered = Dataset.from_dict(rows | dict(label=[f'LABEL_{y%2}' for y in LABELS]))
    plain = tiny(num_labels=2)
    same(mask_fisher(plain, numbered, tokenizer=tok), heads_of(plain, read(tok, PREMISES, labels=[y%2 for y in LABELS])))

@pytest.mark.parametrize('task, why', [('sst2', 'has 2 labels, but the model has 3'), ('stsb', 'is about numbers')])
def test_a_known_task_is_checked_wherever_it_is_known(tmp_path, monkeypatch, capsys, task, why):
    m = saved(tmp_path/'m', tiny(dtype=torch.float32))
    columns = dict(sst2=['sentence'], stsb=['sentence1', 'sentence2'])[task]
    for split in ('train', 'validation'):
        (tmp_path/task).mkdir(exist_ok=True)
        table = {c: PREMISES[:2] for c in columns} | dict(label=[0, 1] if task == 'sst2' else [.5, 2.])
        pq.write_table(pa.table(table), tmp_path/task/f'{split}.parquet')
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path))
    spec, out = f'glue:{task}', str(tmp_path/'out')
    for line in (['fisher', str(m), '--data', spec, '--out', out], ['evaluate', str(m), '--data', spec],
                 ['merge', f'a={m}', f'b={m}', '--data', f'a={spec}', f'b={spec}', '--out', out]):
        assert main(line) == 2
        assert why in capsys.readouterr().err


@pytest.mark.parametrize('column, kind', [('labels', None), ('gold', None), ('label', 'int32'), ('label', 'int8')])
def test_names_are_stored_with_any_column(tmp_path, column, kind):
    names = ('entailment', 'neutral', 'contradiction')
    rows = Dataset.from_dict({'text': PREMISES, column: LABELS}).cast_column(column, ClassLabel(names=list(names)))
    rows.to_parquet(tmp_path/'r.parquet')
    if kind:
        table = pq.read_table(tmp_path/'r.parquet')
        pq.write_table(table.set_column(1, column, table[column].cast(kind)).replace_schema_metadata(table.schema.metadata), tmp_path/'r.parquet')
    model, tok = named(), tokenizer(tmp_path)
    data, _ = load_rows(tmp_path/'r.parquet', model, label=column)
    same(mask_fisher(model, data, tokenizer=tok), heads_of(model, read(tok, PREMISES, labels=[(y+1)%3 for y in LABELS])))

@pytest.mark.parametrize('own, names', [(('LABEL_0', 'LABEL_1', 'LABEL_2'), ('2', '0', '1')), (('LABEL_0', 'LABEL_1', 'LABEL_2'), ('LABEL_2', 'LABEL_0', 'LABEL_1')), (('0', '1', '2'), ('3', '1', '2'))])
def test_bare_numbers_are_matched_by_number(own, names):
    model = named(own)
    meant = [sorted(names).index(names[y]) for y in LABELS]
    by_hand = [collate([o | dict(labels=y)]) for o, y in zip(examples(len(meant)), meant)]
    same(mask_fisher(model, classes(names)), heads_of(model, by_hand))

def test_names_beside_numbers_are_read_wherever_they_stand():
    rows = classes(('entailment', 'neutral', 'contradiction'))
    want = mask_fisher(named(), rows).heads
    same(mask_fisher(named(), rows.add_column('labels', LABELS)), want)
    model = tiny()
    model.config.label2id = {o: i for i, o in enumerate(NLI)}
    same(mask_fisher(model, rows), want)

def test_an_own_loss_sees_the_model_s_classes():
    rows = classes(('entailment', 'neutral', 'contradiction'))
    def loss(model, batch): return torch.nn.functional.cross_entropy(model(**{k: batch[k] for k in ('input_ids', 'attention_mask')}).logits, batch['labels'], reduction='none')
    same(mask_fisher(named(), rows, loss=loss), mask_fisher(named(), rows).heads)

def test_an_order_by_the_alphabet_is_no_order_of_a_model(tmp_path):
    Dataset.from_dict(dict(text=PREMISES, label=[('spam', 'ham')[y%2] for y in LABELS])).to_csv(tmp_path/'w.csv')
    with pytest.raises(ValueError, match='the model has no names for them'): mask_fisher(tiny(num_labels=2), load_task(tmp_path/'w.csv')[0], tokenizer=tokenizer(tmp_path))
    rows = Dataset.from_dict(dict(text=PREMISES*3, label=[f'LABEL_{i}' for i in range(12)]+['LABEL_0']*3))
    rows.to_json(tmp_path/'n.jsonl')
    assert load_task(tmp_path/'n.jsonl')[0]['label'][:12] == list(range(12))

def test_a_nameless_model_is_scored_in_the_order_of_the_task():
    model, plain = tiny(num_labels=2), [0, 1, 1, 0, 1]
    flipped = classes(('positive', 'negative'), [1-y for y in plain])
    want = evaluate(model, classes(('negative', 'positive'), plain), 'sst2')
    assert evaluate(model, flipped, 'sst2') == want
    with pytest.raises(ValueError, match="no 'x'"): evaluate(model, classes(('x', 'y'), plain), 'sst2')


# --- what is read of a file -------------------------------------------------------------------

def test_columns_are_those_of_all_rows(tmp_path):
    rows = [dict(premise=a, label=y) | (dict(hypothesis=b) if i else {}) for i, (a, b, y) in enumerate(zip(PREMISES, HYPOTHESES, LABELS))]
    (tmp_path/'gap.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="column 'hypothesis' is empty in 1 rows, first in row 0"): load_task(tmp_path/'gap.jsonl')
    rows[0]['hypothesis'] = HYPOTHESES[0]
    (tmp_path/'whole.json').write_text(json.dumps(rows))
    (tmp_path/'whole.jsonl.gz').write_bytes(gzip.compress('\n'.join(map(json.dumps, rows)).encode()))
    model, tok = tiny(), tokenizer(tmp_path)
    for name in ('whole.json', 'whole.jsonl.gz'):
        same(mask_fisher(model, load_task(tmp_path/name)[0], tokenizer=tok), heads_of(model, read(tok, PREMISES, HYPOTHESES)))

def zipped(o): return gzip.compress(o, mtime=0) # a time would give a test another name in each process

@pytest.mark.parametrize('name, content, why', [
    ('a.csv', 'text,label\nÜber,0\nunter,1\n'.encode('latin1'), 'not text in UTF-8'),
    ('a.csv', 'text,label\nab,0\ncd,1\n'.encode('utf-16'), 'UTF-8'),
    ('a.jsonl', '{"text": "ab", "label": 0}'.encode('utf-16-le'), 'zero bytes'),
    ('a.jsonl', b'[{"text": "a", "label": 0}]', 'call it .json'),
    ('a.jsonl', b'{"text": "a", "label": 0}\n{"text": 3, "label": 1}', "column 'text' holds str, but 3 in row 1"),
    ('a.jsonl', b'{"text": "a"}\n["b"]', 'row 1 is list; expected an object'),
    ('a.json', b'{"rows": [1]', 'line 1 is not JSON'),
    ('a.csv', b'text,text,label\na,b,0\n', "column 'text' is there twice"),
    ('a.csv', b'text;label\na,b;0\n', "its header is separated by ';', expected commas; save it with commas"),
    ('a.csv', b'\xef\xbb\xbftext;label\n"a;0\n', "its header is separated by ';'"), ('a.csv', b'\n"a,b"\tlabel\na\t0\n', 'its header is separated by tabs, expected commas'),
    ('a.tsv', b'text,label\na,0\n', 'its header is separated by commas, expected tabs'), ('a.tsv.gz', zipped(b'text;label\na;0\n'), "its header is separated by ';', expected tabs"),
    ('a.csv', b'text,label\na,0,1\n', 'Expected 2 columns, got 3'),
    ('a.tsv', b'text\tlabel\n"so it\t0\nwent"\t1\n', 'a quote is not closed'),
    ('a.csv', b'text,label\na,true\nb,false\n', 'labels must be integers, floats or strings, got bool'),
    ('a.csv', b'text,label\na,0\nb,\nc,1\n', "column 'label' is empty in 1 rows, first in row 1"),
    ('a.csv.gz', b'text,label\na,0\n', 'it is no whole gzip file: Not a gzipped file'),
    ('a.csv.gz', zipped(b'text,label\nab,0\ncd,1\n')[:-9], 'it is no whole gzip file: Compressed file ended'),
    ('a.csv.gz', zipped(b'text,label\nab,0\ncd,1\n')[:10]+b'\xff'*20, 'it is no whole gzip file: Error -3 while decompressing'),
    ('a.csv.gz', zipped('text,label\nÜber,0\n'.encode('latin1')), 'not text in UTF-8'),
    ('a.json', b'{"data": [{"text": "a", "label": 0}]}', r"it is one object, with \['data'\]; expected a list of rows"),
    ('a.json', b'{\n "version": 1,\n "rows": [{"text": "a", "label": 0}]\n}', 'it is one object, with .*; expected a list of rows')])
def test_a_file_that_says_something_else_is_refused(tmp_path, name, content, why):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=why) as e: load_task(tmp_path/name)
    assert name in str(e.value) and '\n' not in str(e.value)

def test_one_row_may_hold_a_list(tmp_path):
    "An object in one line is a row, whatever else is in it; what is called `data` may hold numbers."
    (tmp_path/'a.json').write_text('{"messages": [{"role": "user"}], "data": [1, 2]}')
    assert read_table(tmp_path/'a.json').num_rows == 1

@pytest.mark.parametrize('head', ['classifier', 'token classifier'])
def test_a_column_is_text_or_label(tmp_path, head):
    (tmp_path/'a.csv').write_text('text,label\na,0\nb,1\n')
    for read in (lambda **how: load_task(tmp_path/'a.csv', head=head, **how), lambda **how: text_rows(tmp_path/'a.csv', **how)):
        with pytest.raises(ValueError, match="a.csv: column 'text' cannot be both `text` and `label`"): read(text=['text'], label='text')

@pytest.mark.parametrize('how, why', [
    (dict(text='reviewz', label='stars'), r"column 'reviewz' is not there; expected text, among \['review', 'stars', 'label'\]"),
    (dict(text='label', label='stars'), r"column 'label' holds labels, which are not read as text; name another with `text=` \(--text\), among \['review'\]"),
    (dict(text='label'), r"column 'label' holds labels.*among \['review', 'stars'\]")])
def test_columns_are_named_as_the_file_names_them(tmp_path, how, why):
    (tmp_path/'a.csv').write_text('review,stars,label\na,0,x\nb,1,y\n')
    for read in (load_task, text_rows):
        with pytest.raises(ValueError, match=f'^a.csv: {why}$'): read(tmp_path/'a.csv', **how)

def test_a_byte_order_mark_is_no_letter(tmp_path):
    for name, text in (('a.csv', 'text,label\nab,0\ncd,1\n'), ('a.jsonl', '{"text": "ab", "label": 0}\n{"text": "cd", "label": 1}')):
        (tmp_path/name).write_text(text, encoding='utf-8-sig')
        assert load_task(tmp_path/name)[0]['text'][:] == ['ab', 'cd']

def test_categories_are_words(tmp_path):
    words = pa.array(['spam', 'ham', 'spam']).dictionary_encode()
    pq.write_table(pa.table(dict(text=pa.array(PREMISES[:3]).dictionary_encode(), label=words)), tmp_path/'a.parquet')
    rows, task = load_task(tmp_path/'a.parquet')
    assert task.labels == ('ham', 'spam') and rows['label'][:] == [1, 0, 1] and rows['text'][:] == PREMISES[:3]


@pytest.mark.parametrize('name, content', [
    ('a.csv', 'label,text\n1,x\n0,"a cat\n1,b\n0,c\n1,d\n'), ('a.csv', 'label,text\n1,"it" rains\n0,b\n'), ('a.tsv', 'label\ttext\n1\t"it rains\n0\tb\n'),
    ('a.jsonl', '{"text": "a", "label": 0, "label": 1}\n{"text": "b", "label": 1}\n')])
def test_what_a_reader_would_swallow_is_refused(tmp_path, name, content):
    (tmp_path/name).write_text(content)
    with pytest.raises(ValueError, match=f'{name} cannot be read: .*(quote|twice)'): load_task(tmp_path/name)


# --- which tokenizer --------------------------------------------------------------------------

SHOUTED = ['The Cat sat', 'it rains', 'The cat is wet']

def test_every_model_reads_with_its_own_tokenizer(tmp_path):
    a, b = saved(tmp_path/'a', tiny(num_labels=2), lower=True), saved(tmp_path/'b', tiny(num_labels=2, seed=1), lower=False)
    rows = Dataset.from_dict(dict(text=SHOUTED, label=[0, 1, 0]))
    merged = merge(dict(a=a, b=b), data=dict(a=rows, b=rows))
    alone = {t: mask_fisher(m, rows, tokenizer=tokenizer(tmp_path/f'{t}-tok', low)) for t, m, low in (('a', a, True), ('b', b, False))}
    want = merge(dict(a=a, b=b), alone)
    for n, p in want.body.state_dict().items(): assert torch.equal(merged.body.state_dict()[n], p), n
    assert merged.tokenizer is None and merged.tokenizers['a'].tokenize('The') == ['the'] and merged.tokenizers['b'].tokenize('The') == ['The']
    merged.save_pretrained(tmp_path/'out')
    again = Merged.from_pretrained(tmp_path/'out')
    assert not (tmp_path/'out'/'vocab.txt').exists() and not (tmp_path/'out'/'tokenizer.json').exists()
    assert [again.tokenizers[t].tokenize('The') for t in 'ab'] == [['the'], ['The']]
    merge_files(dict(a=a, b=b), method='average', out=tmp_path/'files')
    assert [Merged.from_pretrained(tmp_path/'files').tokenizers[t].tokenize('The') for t in 'ab'] == [['the'], ['The']]

def test_tokenizers_that_do_the_same_are_one(tmp_path):
    a, b = saved(tmp_path/'a', tiny()), saved(tmp_path/'b', tiny(seed=1))
    settings = json.loads((b/'tokenizer_config.json').read_text())
    (b/'tokenizer_config.json').write_text(json.dumps(settings | dict(model_max_length=17)))
    merged = merge(dict(a=a, b=b), method='average')
    assert merged.tokenizer is not None
    merged.save_pretrained(tmp_path/'out')
    assert Merged.from_pretrained(tmp_path/'out').tokenizer.tokenize('The') == ['the']


def test_a_model_in_memory_reads_with_the_tokenizer_beside_it(tmp_path):
    from transformers import AutoModelForSequenceClassification
    a, b = saved(tmp_path/'a', tiny(num_labels=2), lower=True), saved(tmp_path/'b', tiny(num_labels=2, seed=1), lower=False)
    rows = Dataset.from_dict(dict(text=SHOUTED, label=[0, 1, 0]))
    loaded = AutoModelForSequenceClassification.from_pretrained(b, dtype='auto')
    want, got = merge(dict(a=a, b=b), data=dict(a=rows, b=rows)), merge(dict(a=a, b=loaded), data=dict(a=rows, b=rows))
    for n, p in want.body.state_dict().items(): assert torch.equal(got.body.state_dict()[n], p), n
    with pytest.raises(ValueError, match="data of 'b': .*give `tokenizer=`"): merge(dict(a=a, b=tiny(num_labels=2)), data=dict(a=rows, b=rows))


# --- masks and ids ----------------------------------------------------------------------------

@pytest.mark.parametrize('family, pad', [('bert', 0), ('roberta', 1)])
@pytest.mark.parametrize('side', ['right', 'left'])
def test_padding_without_a_mask_is_refused(family, pad, side):
    model = tiny(family)
    ids = [[5, 6, 7], [8, pad, pad] if side == 'right' else [pad, pad, 8]]
    rows = Dataset.from_dict(dict(input_ids=ids, label=[0, 1]))
    batch = dict(input_ids=torch.tensor(ids), labels=torch.tensor([0, 1]))
    for run in (mask_fisher, evaluate, linear_grams):
        for data in (rows, [batch], iter([batch])):
            with pytest.raises(ValueError, match=f'row 1 has padding, token {pad}, and there is no `attention_mask`'): run(model, data)
    mask = [[1, 1, 1], [1, 0, 0] if side == 'right' else [0, 0, 1]]
    whole = batch | dict(attention_mask=torch.tensor(mask))
    want = brute_mask_fisher(model, [whole], strip=False)[0]
    same(mask_fisher(model, [whole]), want)
    same(mask_fisher(model, rows.add_column('attention_mask', mask)), want)
    with pytest.warns(UserWarning, match='row 1 has padding'): mask_fisher(model, rows.add_column('attention_mask', [[1]*3]*2))

@pytest.mark.parametrize('columns, own', [(dict(text=PREMISES), 2), (dict(premise=PREMISES, hypothesis=HYPOTHESES), 3)])
def test_a_limit_leaves_something_of_a_text(tmp_path, columns, own):
    model, tok, rows = named(), tokenizer(tmp_path), Dataset.from_dict(columns | dict(label=LABELS))
    why = f'`max_length` of {own} leaves nothing of a text, since the tokenizer adds {own} tokens of its own; expected at least {own+1}$'
    for f in (mask_fisher, evaluate, lambda *o, **how: merge([model], data=[rows], **how)):
        with pytest.raises(ValueError, match=why): f(model, rows, tokenizer=tok, max_length=own, progress=False)
    assert evaluate(model, rows, tokenizer=tok, max_length=own+1, progress=False)['accuracy'] >= 0

def warned(f, *args, **how):
    "What is said of empty texts."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        f(*args, progress=False, **how)
    return [str(o.message) for o in found if 'empty text' in str(o.message)]

def test_empty_texts_are_counted(tmp_path):
    a, b = saved(tmp_path/'a', named()), saved(tmp_path/'b', named(seed=1))
    some, every = [Dataset.from_dict(dict(text=o, label=LABELS)) for o in (['it', '', 'a cat', ' \t', 'no'], PREMISES)]
    said = '2 of 5 rows have an empty text, the first is row 1'
    for f in (mask_fisher, evaluate, predict): assert warned(f, a, some)==[said] and warned(f, a, every)==[]
    for method in ('mask-fisher', 'best'): assert warned(merge, dict(a=a, b=b), data=dict(a=some, b=every), method=method, refit_heads=.4)==[f"'a': {said}"]
    task = Task('moods', ('text',), NLI)
    assert warned(evaluate, a, some, task)==[f"'moods': {said}"]
    assert warned(predict, a, [''])==['1 of 1 rows has an empty text, the first is row 0']
    pairs = Dataset.from_dict(dict(premise=PREMISES, hypothesis=['no']*4+[''], label=LABELS))
    assert warned(evaluate, a, pairs)==['1 of 5 rows has an empty text, the first is row 4']
    assert warned(Merged.predict, merge(dict(a=a, b=b), method='average'), ['it', ''])==['1 of 2 rows has an empty text, the first is row 1']

def test_rows_without_padding_need_no_mask():
    model, rows = tiny(), examples(6)
    bare = Dataset.from_list([{k: v for k, v in o.items() if k != 'attention_mask'} for o in rows])
    same(mask_fisher(model, bare), heads_of(model, [collate(rows)]))
    same(mask_fisher(model, [{k: v for k, v in collate([o]).items() if k != 'attention_mask'} for o in rows]), heads_of(model, [collate(rows)]))

@pytest.mark.parametrize('extra, why', [
    (dict(input_ids=[[5, 6], [60, 7]]), '60 in `input_ids`; expected 0 to 59'),
    (dict(input_ids=[[5, 6], [7, -100]]), '-100 in `input_ids`'),
    (dict(input_ids=[[5, 6], [7, 8]], token_type_ids=[[0, 1], [0, 2]]), '2 in `token_type_ids`; expected 0 to 1')])
def test_numbers_beyond_the_tables_are_refused(extra, why):
    mask = [[1, 1], [1, 1]]
    rows = Dataset.from_dict(extra | dict(attention_mask=mask, label=[0, 1]))
    batch = {k: torch.tensor(v) for k, v in extra.items()} | dict(attention_mask=torch.tensor(mask), labels=torch.tensor([0, 1]))
    for data in (rows, [batch], iter([batch])):
        with pytest.raises(ValueError, match=f'row 1 has {why}.*tokenised for another model'): mask_fisher(tiny(), data)

def test_types_of_another_family_and_long_rows_are_refused():
    batch = collate(examples(2)) | dict(token_type_ids=torch.ones(2, 9, dtype=torch.long))
    roberta = RobertaForSequenceClassification(RobertaConfig(**tiny('roberta').config.to_diff_dict() | dict(type_vocab_size=1)))
    with pytest.raises(ValueError, match='row 0 has 1 in `token_type_ids`; expected 0 to 0'): mask_fisher(roberta, [batch])
    long = dict(input_ids=torch.full((1, 41), 5), labels=torch.tensor([0]))
    for data in ([long], Dataset.from_dict(dict(input_ids=[[5]*41], label=[0]))):
        with pytest.raises(ValueError, match='41 tokens; expected 1 to 40'): mask_fisher(tiny(), data)

@pytest.mark.parametrize('column', ['input_ids', 'attention_mask'])
def test_tokens_are_whole_numbers(column):
    rows = dict(input_ids=[[5, 6], [7, 8]], attention_mask=[[1, 1], [1, 1]], label=[0, 1])
    rows[column] = [[1., 1.], [1., .5]]
    with pytest.raises(ValueError, match=f'`{column}` of row 0 has float64; expected whole numbers'): mask_fisher(tiny(), Dataset.from_dict(rows))


def test_padding_in_the_middle_and_empty_rows_are_refused():
    with pytest.raises(ValueError, match='row 0 has padding'): mask_fisher(tiny(), [dict(input_ids=torch.tensor([[9, 0, 0, 10]]), labels=torch.tensor([0]))])
    batch = collate(examples(3))
    batch['attention_mask'][1] = 0
    with pytest.raises(ValueError, match='row 1 has 0 tokens'): mask_fisher(tiny(), [batch])

@pytest.mark.parametrize('change', [dict(attention_mask=torch.ones(9)), dict(attention_mask=torch.ones(3, 4)), dict(input_ids=torch.ones(3, 9)), dict(token_type_ids=torch.zeros(2, 9, dtype=torch.long))])
def test_tensors_of_another_shape_are_named(change):
    key = next(iter(change))
    with pytest.raises(ValueError, match=f'`{key}` at example 0 is .*expected whole numbers of shape'): mask_fisher(tiny(), [collate(examples(3)) | change])


# --- which code runs --------------------------------------------------------------------------

def replace_by_closure(model):
    old = model.bert.forward
    model.bert.forward = lambda *a, **k: old(*a, **k)

def replace_by_autocast(model): model.forward = torch.autocast('cpu', enabled=False)(model.forward)
def replace_by_compiled(model): model.classifier.compile(backend='eager')
def replace_by_method(model): model.classifier.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x, self.weight, self.bias), model.classifier)

def replace_by_partial(model):
    old = model.bert.forward
    model.bert.forward = functools.partial(lambda *a, **k: old(*a, **k))

def replace_by_bound_closure(model):
    old = model.bert.forward
    model.bert.forward = types.MethodType(lambda self, *a, **k: old(*a, **k), model.bert)

def replace_by_wrapped_module(model): model.classifier = torch.compile(model.classifier, backend='eager')

@pytest.mark.parametrize('change', [replace_by_closure, replace_by_autocast, replace_by_compiled, replace_by_method, replace_by_partial, replace_by_bound_closure, replace_by_wrapped_module])
@pytest.mark.filterwarnings('ignore:`forward` of a')
def test_a_merged_task_runs_its_own_code(change):
    plain, models = dict(a=tiny(), b=tiny(seed=1)), dict(a=tiny(), b=tiny(seed=1))
    for m in models.values(): change(m)
    batch = {k: v for k, v in collate(examples(3)).items() if k != 'labels'}
    want, got = merge(plain, method='average'), merge(models, method='average')
    with torch.no_grad():
        for t in 'ab':
            assert_close(got[t](**batch).logits, want[t](**batch).logits, rtol=1e-12, atol=0)
            assert (got[t](**batch).logits-models[t](**batch).logits).abs().max() > 1e-3
            assert_close(got.logits(**batch)[t], want[t](**batch).logits, rtol=1e-12, atol=0)

def test_replaced_code_is_said():
    models = dict(a=tiny(), b=tiny(seed=1))
    replace_by_closure(models['b'])
    replace_by_closure(models['a'])
    with pytest.warns(UserWarning, match='`forward` of a BertModel was replaced'): merge(models, method='average')


# --- what stays as it was ---------------------------------------------------------------------

@pytest.mark.parametrize('body', [torch.float16, torch.bfloat16])
def test_a_head_is_kept_to_the_bit(tmp_path, body):
    models = {}
    for i, t in enumerate('ab'):
        models[t] = tiny(dtype=torch.float32, seed=i)
        models[t].bert.to(body)
    merged = merge(models, method='average')
    assert merged.body.dtype == body
    merged.save_pretrained(tmp_path/'out')
    for found in (merged, Merged.from_pretrained(tmp_path/'out')):
        for t, m in models.items():
            for n, p in head_tensors(m).items():
                got = head_tensors(found[t])[n]
                assert got.dtype == p.dtype and torch.equal(got, p), (t, n)

def test_a_narrow_head_is_widened_exactly():
    merged = merge(dict(a=tiny(dtype=torch.bfloat16), b=tiny(dtype=torch.float32)), method='average')
    batch = {k: v for k, v in collate(examples(2)).items() if k != 'labels'}
    assert merged['a'](**batch).logits.dtype == torch.float32
    assert torch.equal(merged['a'].classifier.weight, tiny(dtype=torch.bfloat16).classifier.weight.float())


def test_a_head_tied_to_the_body_comes_back(tmp_path):
    model = tiny(num_labels=16, dtype=torch.float32)
    model.classifier.weight = model.bert.pooler.dense.weight
    other = tiny(num_labels=3, dtype=torch.float32, seed=1)
    merged = merge(dict(a=model, b=other), method='average')
    merged.save_pretrained(tmp_path/'x')
    batch = {k: v for k, v in collate(examples(3)).items() if k != 'labels'}
    with torch.no_grad(): assert_close(Merged.from_pretrained(tmp_path/'x')['a'](**batch).logits, merged['a'](**batch).logits, rtol=1e-5, atol=1e-6)


# --- what is iterated -------------------------------------------------------------------------

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield from examples(6)

def loaders():
    rows = examples(6)
    yield 'list', [collate(rows[:4]), collate(rows[4:])]
    yield 'generator', (collate(rows[i:i+2]) for i in (0, 2, 4))
    yield 'loader of a stream', DataLoader(Stream(), batch_size=4, collate_fn=collate)
    yield 'loader of rows', DataLoader(rows, batch_size=3, collate_fn=collate)
    yield 'loader of a datasets stream', DataLoader(IterableDataset.from_generator(lambda: iter(rows)), batch_size=4, collate_fn=collate)
    yield 'label in place of labels', [{'label' if k == 'labels' else k: v for k, v in collate(rows).items()}]
    yield 'keys that the model does not take', [collate(rows) | dict(idx=torch.arange(6), text=['a']*6)]
    yield 'data set', Dataset.from_list(rows)
    yield 'label beside labels', Dataset.from_list([o | dict(label=o['labels']) for o in rows])
    yield 'torch format', Dataset.from_list(rows).with_format('torch')
    yield 'numpy format', Dataset.from_list(rows).with_format('numpy')
    yield 'transform', Dataset.from_list(rows).with_transform(lambda o: o)
    hidden = Dataset.from_dict(dict(i=list(range(6))))
    yield 'rows made on the way', hidden.with_transform(lambda o: {k: [torch.tensor(rows[i][k]) for i in o['i']] for k in rows[0]})

@pytest.mark.parametrize('name', [n for n, _ in loaders()])
def test_everything_that_gives_batches_works_alike(name):
    model = tiny()
    want = heads_of(model, [collate(examples(6))])
    same(mask_fisher(model, dict(loaders())[name]), want)
    assert set(evaluate(model, dict(loaders())[name])) == {'accuracy'}

def test_a_transform_is_seen(tmp_path):
    model, tok = tiny(), tokenizer(tmp_path)
    rows = Dataset.from_dict(dict(text=[o.upper() for o in PREMISES], label=LABELS))
    loud = tokenizer(tmp_path/'loud', lower=False)
    low = rows.with_transform(lambda o: dict(text=[t.lower() for t in o['text']], label=o['label']))
    want = heads_of(model, read(tok, PREMISES))
    same(mask_fisher(model, low, tokenizer=loud), want)
    same(mask_fisher(model, rows.with_transform(lambda o: tok(o['text']) | dict(labels=o['label']))), want)

def test_two_columns_of_labels_that_differ_are_refused():
    rows = [o | dict(label=(o['labels']+1)%3) for o in examples(4)]
    batch = collate(rows) | dict(label=torch.tensor([o['label'] for o in rows]))
    for data in (Dataset.from_list(rows), [batch]):
        with pytest.raises(ValueError, match='`label` and `labels` differ, first in example 0'): mask_fisher(tiny(), data)


def test_columns_that_a_format_hides_are_not_read():
    rows = [o | dict(token_type_ids=[1]*len(o['input_ids'])) for o in examples(4)]
    hidden = Dataset.from_list(rows).with_format('torch', columns=['input_ids', 'attention_mask', 'labels'])
    model = tiny()
    same(mask_fisher(model, hidden), heads_of(model, [collate(examples(4))]))

def test_merging_while_a_model_is_measured():
    models, data = dict(a=tiny(), b=tiny(seed=1)), Dataset.from_list(examples(6))
    want, fisher = merge(models, method='average').body.state_dict(), mask_fisher(models['a'], data, progress=False).heads
    def one(i): return merge(models, method='average', progress=False).body.state_dict() if i%2 else mask_fisher(models['a'], data, progress=False).heads
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(one, range(24)))
    for i, o in enumerate(got): assert all(torch.equal(o[n], t) for n, t in want.items()) if i%2 else torch.equal(o, fisher)


# --- what threads share -----------------------------------------------------------------------

def test_threads_may_measure_one_model():
    model, data = tiny(), [Dataset.from_list(examples(5, seed=s)) for s in range(4)]
    model.classifier.bias.requires_grad_(False)
    want = [mask_fisher(model, o, progress=False) for o in data]
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda i: mask_fisher(model, data[i%4], progress=False), range(24)))
    for i, o in enumerate(got): assert torch.equal(o.heads, want[i%4].heads) and torch.equal(o.rows, want[i%4].rows), i
    assert not model.classifier.bias.requires_grad and model.classifier.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_threads_may_measure_the_tasks_of_one_body():
    merged = merge(dict(a=tiny(), b=tiny(seed=1)), method='average')
    data = Dataset.from_list(examples(6))
    want = {t: mask_fisher(m, data, progress=False).heads for t, m in merged.items()}
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda t: (t, mask_fisher(merged[t], data, progress=False).heads), 'abab'*4))
    for t, heads in got: assert torch.equal(heads, want[t])


# --- where ------------------------------------------------------------------------------------

def test_the_meta_device_is_refused_before_anything_moves(tmp_path, capsys):
    model, rows = tiny(dtype=torch.float32), Dataset.from_list(examples(4))
    before = {n: p.clone() for n, p in model.named_parameters()}
    saved(tmp_path/'m', model)
    for run in (lambda: mask_fisher(model, rows, device='meta'), lambda: evaluate(model, rows, device=torch.device('meta')),
                lambda: linear_grams(model, rows, device='meta'), lambda: merge(dict(a=model, b=tiny(dtype=torch.float32)), data=dict(a=rows, b=rows), device='meta'),
                lambda: merge_files([tmp_path/'m', tmp_path/'m'], method='average', out=tmp_path/'o', device='meta'),
                lambda: finetune(model, rows, out=tmp_path/'p', device='meta')):
        with pytest.raises(ValueError, match="the device 'meta' holds no numbers"): run()
    for n, p in model.named_parameters(): assert torch.equal(p, before[n]), n
    assert not (tmp_path/'o').exists() and not (tmp_path/'p').exists()
