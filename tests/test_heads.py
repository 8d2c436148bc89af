"""Every kind of head: measured, scored, merged, saved and loaded, against losses and masks written here a second time."""
import math
import warnings

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from torch.testing import assert_close
from transformers import (
    ASTConfig, ASTForAudioClassification, BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, BertForMultipleChoice, BertForQuestionAnswering,
    BertForSequenceClassification, BertForTokenClassification, BertModel, CLIPConfig, CLIPForImageClassification, CLIPModel, DistilBertConfig, DistilBertForTokenClassification,
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM, T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification,
    Wav2Vec2Config, Wav2Vec2ForSequenceClassification)

import words
from fisher_nodes import Merged, evaluate, linear_grams, mask_fisher, merge, merge_files, parameter_fisher, predict
from fisher_nodes.core.families import body_of
from fisher_nodes.core.fisher import draw_labels
from fisher_nodes.core.heads import IGNORED, head_of
from fisher_nodes.core.places import find_nodes

QUIET = dict(progress=False)


# --- tiny models ----------------------------------------------------------------------------

SIZE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=40, pad_token_id=0)
DECODER = dict(bos_token_id=1, eos_token_id=2)
VISION = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4)
SOUND = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
OLD = transformers.__version__.startswith('5.0.')
CASES = { # name -> config, class
    'tags': (BertConfig(**SIZE, num_labels=5), BertForTokenClassification),
    'tags-distilbert': (DistilBertConfig(vocab_size=60, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=40, num_labels=5), DistilBertForTokenClassification),
    'questions': (BertConfig(**SIZE), BertForQuestionAnswering), 'choices': (BertConfig(**SIZE), BertForMultipleChoice),
    'masked': (BertConfig(**SIZE), BertForMaskedLM), 'masked-roberta': (RobertaConfig(**SIZE | dict(pad_token_id=1)), RobertaForMaskedLM),
    'writer-gpt2': (GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=40, pad_token_id=0, **DECODER), GPT2LMHeadModel),
    'writer-llama': (LlamaConfig(**SIZE, num_key_value_heads=2, **DECODER), LlamaForCausalLM),
    'answers-t5': (T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0), T5ForConditionalGeneration),
    'answers-bart': (BartConfig(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
                                max_position_embeddings=40, pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None, **DECODER), BartForConditionalGeneration),
    'images': (ViTConfig(**VISION, num_labels=3), ViTForImageClassification),
    'images-clip': (CLIPConfig(text_config=SIZE | DECODER, vision_config=VISION, num_labels=3), CLIPForImageClassification),
    'sounds': (Wav2Vec2Config(**SOUND, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                              num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3), Wav2Vec2ForSequenceClassification),
    'spectra': (ASTConfig(**SOUND, patch_size=4, max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4, num_labels=3), ASTForAudioClassification),
    'several': (BertConfig(**SIZE, num_labels=4, problem_type='multi_label_classification'), BertForSequenceClassification),
    'bce': (BertConfig(**SIZE, num_labels=1), BertForSequenceClassification), 'pairs': (BertConfig(**SIZE), BertModel)}
TEXT = [o for o in CASES if not o.startswith(('images', 'sounds', 'spectra'))]
MANY = [o for o in CASES if o.startswith(('tags', 'questions', 'masked', 'writer', 'answers', 'several'))]
WHOLE = [o for o in CASES if o.startswith(('masked', 'writer', 'answers'))]

def build(name, seed=0, dtype=torch.float64):
    if OLD and name == 'images-clip': pytest.skip(f'transformers {transformers.__version__} has no body of this model, so that it is refused')
    config, cls = CASES[name]
    torch.manual_seed(seed)
    model = cls(type(config).from_dict(config.to_dict()))
    with torch.no_grad():
        for p in model.parameters(): p += .2*torch.randn_like(p)
    return model.to(dtype).eval()

def loss_of(name): return dict(loss='bce') if name == 'bce' else {}


# --- rows, of unequal length ----------------------------------------------------------------

def some(gen, n): return torch.randint(4, 60, (n,), generator=gen).tolist()

def one_of(gen, n): return torch.randint(n, (), generator=gen).item()

def rows_of(name, n=6):
    "Tokenised rows, as a data set has them."
    gen, found = torch.Generator().manual_seed(3), []
    for i in range(n):
        length = (7, 3, 9, 5, 12, 4)[i%6]
        row = dict(input_ids=some(gen, length))
        if name.startswith('tags'): row |= dict(labels=[IGNORED if j%3 == 2 else one_of(gen, 5) for j in range(length)])
        elif name == 'questions': row |= dict(start_positions=length//3, end_positions=length//2)
        elif name == 'choices': row = dict(input_ids=[some(gen, length+j) for j in range(3)], labels=one_of(gen, 3))
        elif name.startswith('masked'): row |= dict(labels=[o if j%4 == 1 else IGNORED for j, o in enumerate(row['input_ids'])])
        elif name.startswith('writer'): row |= dict(labels=[IGNORED]*2 + row['input_ids'][2:])
        elif name.startswith('answers'): row |= dict(labels=some(gen, 2+i%3))
        elif name.startswith('images'): row = dict(pixel_values=torch.randn(3, 8 if name == 'images' else 8, 8, generator=gen).tolist(), labels=one_of(gen, 3))
        elif name == 'sounds': row = dict(input_values=torch.randn(400+100*(i%2), generator=gen).tolist(), labels=one_of(gen, 3))
        elif name == 'spectra': row = dict(input_values=torch.randn(16, 8, generator=gen).tolist(), labels=one_of(gen, 3))
        elif name == 'several': row |= dict(labels=[one_of(gen, 2) for _ in range(4)])
        elif name == 'bce': row |= dict(labels=one_of(gen, 2))
        elif name == 'pairs': row |= dict(input_ids_2=some(gen, 3+i), labels=i/7)
        found.append(row)
    return found

def alone(row):
    "One row as a batch, without padding; of several texts the shorter are padded to the longest."
    if isinstance(row.get('input_ids', [0])[0], list):
        width = max(map(len, row['input_ids']))
        mask = [[1]*len(o)+[0]*(width-len(o)) for o in row['input_ids']]
        row = row | dict(input_ids=[o+[0]*(width-len(o)) for o in row['input_ids']], attention_mask=mask)
    return {k: torch.tensor([v], dtype=torch.float64 if isinstance(v, float) or 'values' in k else None) for k, v in row.items()}

def slow_loss(name, model, row):
    "−log p of one row, by loops: the loss, and of how many choices it is the sum."
    given = alone({k: v for k, v in row.items() if k not in ('labels', 'before', 'start_positions', 'end_positions')})
    y = row.get('labels')
    def minus_log(z, i): return -torch.log_softmax(z, -1)[i]
    if name == 'pairs':
        a, b = [model(input_ids=torch.tensor([row[k]])).last_hidden_state[0].mean(0) for k in ('input_ids', 'input_ids_2')]
        return (a@b/(a.norm()*b.norm())-y)**2, 1
    if name.startswith('answers'):
        start = model.config.decoder_start_token_id
        z = model(**given, decoder_input_ids=torch.tensor([[start, *row.get('before', y)[:-1]]])).logits[0]
        return sum(minus_log(z[i], o) for i, o in enumerate(y)), len(y)
    out = model(**given)
    if name == 'questions': return minus_log(out.start_logits[0], row['start_positions'])+minus_log(out.end_logits[0], row['end_positions']), 2
    z = out.logits[0]
    if name in ('several', 'bce'):
        y = [y] if name == 'bce' else y
        return sum(-torch.log(torch.sigmoid(z[i] if o else -z[i])) for i, o in enumerate(y)), len(y)
    if name.startswith('writer'): z, y = z[:-1], y[1:]
    if not isinstance(y, list): return minus_log(z, y), 1
    kept = [(i, o) for i, o in enumerate(y) if o != IGNORED]
    return sum(minus_log(z[i], o) for i, o in kept), len(kept)

def literal(name, model, row, block):
    "Gradient of masks that really multiply at one block, for one row by itself."
    site, masks = block.site, torch.ones(block.site.nodes, dtype=torch.float64, requires_grad=True)
    bias = site.module.bias if site.side == 'output' and site.module.bias is not None else 0
    def masked(x): return (x-bias)*masks.repeat_interleave(block.size)+bias
    before, after = site.module.register_forward_pre_hook, site.module.register_forward_hook
    handle = before(lambda m, args: (masked(args[0]), *args[1:])) if site.side == 'input' else after(lambda m, args, z: masked(z))
    try: return torch.autograd.grad(slow_loss(name, model, row)[0], masks)[0]
    finally: handle.remove()

def brute(name, model, rows, weights=None):
    "Per block the mean over rows of squared mask gradients, each scaled."
    weights = weights or [1.]*len(rows)
    return {o.name: sum(w*literal(name, model, r, o)**2 for w, r in zip(weights, rows))/len(rows) for o in find_nodes(model)}

def by_block(model, fisher):
    "What a Fisher has for each block; the first kind of nodes that a block has."
    layers = {k: iter(v) for k, v in fisher.kinds.items()}
    found = {}
    for o in find_nodes(model):
        per = {k: next(layers[k]) for k in o.counts}
        found[o.name] = per[o.kind]
    return found

FLOAT32 = ('writer-llama', 'answers-t5', 'pairs') # their norms, or the label of a pair, are float32

def same(name, model, got, want):
    got = by_block(model, got)
    assert got.keys() == want.keys()
    for k, w in want.items(): assert_close(got[k].double(), w, rtol=1e-5 if name in FLOAT32 else 1e-9, atol=1e-12*w.max().item(), msg=lambda m: f'{name} {k}: {m}')


# --- measured -------------------------------------------------------------------------------

@pytest.mark.parametrize('name', CASES)
def test_fisher_is_that_of_literal_masks_on_one_row_alone(name):
    model, rows = build(name), rows_of(name)
    same(name, model, mask_fisher(model, Dataset.from_list(rows), **loss_of(name), **QUIET), brute(name, model, rows))

@pytest.mark.parametrize('name', ['tags', 'questions', 'masked', 'writer-gpt2', 'writer-llama', 'answers-t5', 'several'])
@pytest.mark.parametrize('side', ['right', 'left'])
def test_own_batches_on_either_side(name, side):
    "Positions of BERT are by place, and padding on the left is used as given; there the rows have one length."
    model, rows = build(name), rows_of(name)
    if side == 'left' and name in ('tags', 'questions', 'masked', 'several'): rows = [rows[0]]*2
    width = max(len(r['input_ids']) for r in rows)
    def fit(o, fill, width=width): return o+[fill]*(width-len(o)) if side == 'right' else [fill]*(width-len(o))+o
    batch = dict(input_ids=torch.tensor([fit(r['input_ids'], 0) for r in rows]), attention_mask=torch.tensor([fit([1]*len(r['input_ids']), 0) for r in rows]))
    if name == 'questions': batch |= {k: torch.tensor([r[k] for r in rows]) for k in ('start_positions', 'end_positions')}
    elif name == 'several': batch['labels'] = torch.tensor([r['labels'] for r in rows])
    else:
        longest = max(len(r['labels']) for r in rows)
        batch['labels'] = torch.tensor([r['labels']+[IGNORED]*(longest-len(r['labels'])) if name.startswith('answers') else fit(r['labels'], IGNORED, longest) for r in rows])
    same(name, model, mask_fisher(model, [batch], **QUIET), brute(name, model, rows))

@pytest.mark.parametrize('name', MANY)
def test_reductions(name):
    model, rows = build(name), rows_of(name)
    with torch.no_grad(): counts = [slow_loss(name, model, r)[1] for r in rows]
    data = Dataset.from_list(rows)
    same(name, model, mask_fisher(model, data, reduction='mean', **QUIET), brute(name, model, rows, [1/n**2 for n in counts]))
    found = mask_fisher(model, data, reduction='per-token', **QUIET)
    same(name, model, found, brute(name, model, rows, [len(rows)/sum(counts)]*len(rows)))
    assert (found.meta['reduction'], found.meta['num_choices'], found.num_examples) == ('per-token', sum(counts), len(rows))

@pytest.mark.parametrize('name', ['tags', 'questions', 'masked', 'writer-llama', 'answers-t5', 'several', 'choices', 'bce', 'images'])
def test_drawn_labels_are_those_of_the_row(name):
    "The sampled Fisher is the true one of rows that have the drawn labels."
    model, rows = build(name), rows_of(name)
    head = head_of(model, loss_of(name).get('loss'))
    def drawn(i, row):
        batch = alone(row) | (dict(attention_mask=torch.ones(1, len(row['input_ids'])).long()) if name == 'questions' else {})
        with torch.no_grad(): z = head.logits(model, batch)
        y = draw_labels(z, head.labels(batch) != IGNORED if head.many else None, [i], 5)[0].tolist()
        if name == 'questions': return row | dict(start_positions=y[0], end_positions=y[1])
        if name == 'writer-llama': return row | dict(labels=[IGNORED, *y])
        return row | dict(labels=y if head.many else y[0]) | (dict(before=row['labels']) if name == 'answers-t5' else {})
    want = brute(name, model, [drawn(i, r) for i, r in enumerate(rows)])
    same(name, model, mask_fisher(model, Dataset.from_list(rows), labels='sampled', seed=5, **loss_of(name), **QUIET), want)

@pytest.mark.parametrize('name', ['choices', 'bce', 'images'])
def test_exact_goes_through_the_classes(name):
    model, rows = build(name), rows_of(name)
    head = head_of(model, loss_of(name).get('loss'))
    every, weights = [], []
    for r in rows:
        with torch.no_grad(): p = head.logits(model, alone(r))[0, 0].softmax(-1).tolist()
        for c, w in enumerate(p): every.append(r | dict(labels=c)); weights.append(w*len(p))
    same(name, model, mask_fisher(model, Dataset.from_list(rows), labels='exact', **loss_of(name), **QUIET), brute(name, model, every, weights))

@pytest.mark.parametrize('name', MANY)
def test_exact_is_refused_where_there_are_many_choices(name):
    with pytest.raises(ValueError, match="labels='exact' goes through the classes of one choice, but a .* makes many"):
        mask_fisher(build(name), Dataset.from_list(rows_of(name)), labels='exact', **QUIET)

@pytest.mark.parametrize('name', CASES)
def test_every_parameter_and_gram(name):
    "Fisher of every parameter by autograd, one row at a time; Gram matrices are there."
    model, rows = build(name), rows_of(name, 3)
    found = parameter_fisher(model, Dataset.from_list(rows), **loss_of(name), **QUIET)
    body = dict(body_of(model).named_parameters())
    total = {n: torch.zeros_like(p) for n, p in body.items()}
    for r in rows:
        grads = torch.autograd.grad(slow_loss(name, model, r)[0], list(body.values()), allow_unused=True)
        for n, g in zip(body, grads): total[n] += 0 if g is None else g**2/len(rows)
    assert {*found.values} == {n for n in body}
    top = max(t.max() for t in total.values()).item()
    for n, t in total.items(): assert_close(found.values[n].double(), t, rtol=1e-5 if name in FLOAT32 else 1e-8, atol=1e-13*top)
    grams = linear_grams(model, Dataset.from_list(rows), **QUIET)
    assert len(grams.values) >= 8 and all((o.diagonal() >= 0).all() for o in grams.values.values())


# --- scored ---------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [o for o in CASES if o != 'pairs'])
def test_scores(name):
    model, rows = build(name), rows_of(name)
    head = head_of(model, loss_of(name).get('loss'))
    found = evaluate(model, Dataset.from_list(rows), **loss_of(name), **QUIET)
    right = whole = made = loss = 0
    for r in rows:
        with torch.no_grad():
            one = alone(r) | (dict(attention_mask=torch.ones(1, len(r['input_ids'])).long()) if name == 'questions' else {})
            z, y = head.logits(model, one)[0], head.labels(one)[0]
            if name == 'questions':
                pairs = {(a, b): z[0, a]+z[1, b] for a in range(z.shape[1]) for b in range(a, z.shape[1])}
                chosen = torch.tensor(max(pairs, key=pairs.get))
            else: chosen = z.argmax(-1)
            value, n = slow_loss(name, model, r)
        kept = y != IGNORED
        right, whole, made, loss = right+(chosen == y)[kept].sum().item(), whole+bool((chosen == y)[kept].all()), made+n, loss+value.item()
    if 'accuracy' in found: assert found['accuracy'] == pytest.approx(right/made)
    if 'exact_match' in found: assert found['exact_match'] == pytest.approx(whole/len(rows))
    if 'perplexity' in found: assert found['perplexity'] == pytest.approx(math.exp(loss/made), rel=1e-6)
    assert {'accuracy', 'exact_match'} & {*found}

def test_similarity_of_pairs_is_scored_by_correlation():
    model, rows = build('pairs'), rows_of('pairs')
    with torch.no_grad(): cosines = [head_of(model).logits(model, alone(r)).item() for r in rows]
    rows = [r | dict(labels=2*c-.3) for r, c in zip(rows, cosines)]
    assert evaluate(model, Dataset.from_list(rows), **QUIET)['pearson'] == pytest.approx(1)

@pytest.mark.parametrize('name', ['tags', 'writer-gpt2', 'questions', 'choices', 'several'])
def test_predictions_of_each_row(name):
    model, rows = build(name), rows_of(name)
    found = predict(model, Dataset.from_list(rows), **QUIET)
    for r, got in zip(rows, found):
        with torch.no_grad(): want = head_of(model).logits(model, alone(r))[0]
        if name == 'questions': got, want = got[:, :want.shape[1]], want
        if name == 'choices': want = want[0]
        assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


# --- merged ---------------------------------------------------------------------------------

@pytest.mark.parametrize('name', CASES)
def test_merged_saved_and_loaded(name, tmp_path):
    "In memory and from files, equal to the bit; what is loaded answers as what was merged."
    models, rows = {t: build(name, i, torch.float32) for i, t in enumerate('ab')}, Dataset.from_list(rows_of(name))
    for t, m in models.items(): m.save_pretrained(tmp_path/t)
    merged = merge(models, data=dict.fromkeys(models, rows), num_samples=None, **loss_of(name), **QUIET)
    merged.save_pretrained(tmp_path/'merged')
    again = Merged.from_pretrained(tmp_path/'merged')
    fishers = {t: mask_fisher(m, rows, **loss_of(name), **QUIET) for t, m in models.items()}
    merge_files({t: tmp_path/t for t in models}, fishers, out=tmp_path/'files', **QUIET)
    filed = Merged.from_pretrained(tmp_path/'files')
    for t, m in merged.items():
        for other in (again[t], filed[t], type(m).from_pretrained(tmp_path/'merged'/t)):
            assert type(other) is type(m)
            for n, p in m.named_parameters(): assert torch.equal(p, other.get_parameter(n)), (t, n)
        assert evaluate(again[t], rows, **loss_of(name), **QUIET) == evaluate(m, rows, **loss_of(name), **QUIET)
    one = {id(p) for p in merged['a'].parameters()} == {id(p) for p in merged['b'].parameters()}
    assert one == (name in WHOLE or name == 'pairs')

@pytest.mark.parametrize('name', CASES)
def test_a_model_merged_with_itself_is_itself(name):
    model, rows = build(name), Dataset.from_list(rows_of(name))
    merged = merge(dict(a=model, b=model), data=dict(a=rows, b=rows), num_samples=None, **loss_of(name), **QUIET)
    for n, p in model.named_parameters(): assert_close(merged['a'].get_parameter(n), p, rtol=1e-12, atol=1e-14)


# --- rows that people can read --------------------------------------------------------------

tokenizer = words.tokenizer

def raw(kind):
    "Rows of two or three examples, the class that reads them, and the same, tokenised by hand."
    v = {w: i for i, w in enumerate(words.WORDS)}
    def ids(text): return [v[w] for w in text.split()]
    if kind == 'tags':
        types = Features(dict(tokens=Sequence(Value('string')), ner_tags=Sequence(ClassLabel(names=['O', 'B-X', 'I-X', 'B-Y', 'I-Y']))))
        rows = Dataset.from_dict(dict(tokens=[['a', 'b'], ['c', 'd', 'e']], ner_tags=[[0, 1], [3, 4, 0]]), types)
        return rows, [dict(input_ids=ids('a b'), labels=[0, 1]), dict(input_ids=ids('c d e'), labels=[3, 4, 0])]
    if kind == 'questions':
        rows = [dict(question='a b', context='c d e', answers=dict(text=['d e'], answer_start=[2])), dict(question='e', context='a b c', answers=dict(text=['a'], answer_start=[0]))]
        return Dataset.from_list(rows), [dict(input_ids=ids('a b c d e'), start_positions=3, end_positions=4), dict(input_ids=ids('e a b c'), start_positions=1, end_positions=1)]
    if kind == 'choices':
        rows = [dict(question='a', choices=['b', 'c d'], label=1), dict(question='b c', choices=['e', 'a'], label=0)]
        return Dataset.from_list(rows), [dict(input_ids=[ids('a b'), ids('a c d')], labels=1), dict(input_ids=[ids('b c e'), ids('b c a')], labels=0)]
    if kind == 'writer-gpt2':
        return Dataset.from_list([dict(text='a b c'), dict(text='d e')]), [dict(input_ids=ids('a b c'), labels=ids('a b c')), dict(input_ids=ids('d e'), labels=ids('d e'))]
    if kind == 'answers-t5':
        rows = [dict(document='a b c', summary='d'), dict(document='e', summary='a b')]
        return Dataset.from_list(rows), [dict(input_ids=ids('a b c'), labels=ids('d')), dict(input_ids=ids('e'), labels=ids('a b'))]
    if kind == 'pairs':
        rows = [dict(sentence1='a b', sentence2='c', score=.5), dict(sentence1='d', sentence2='e a b', score=1.)]
        return Dataset.from_list(rows), [dict(input_ids=ids('a b'), input_ids_2=ids('c'), labels=.5), dict(input_ids=ids('d'), input_ids_2=ids('e a b'), labels=1.)]
    rows = [dict(text='a b', labels=[0, 1, 1, 0]), dict(text='c', labels=[1, 0, 0, 0])]
    return Dataset.from_list(rows), [dict(input_ids=ids('a b'), labels=[0, 1, 1, 0]), dict(input_ids=ids('c'), labels=[1, 0, 0, 0])]

@pytest.mark.parametrize('name', ['tags', 'questions', 'choices', 'writer-gpt2', 'answers-t5', 'pairs', 'several'])
def test_rows_that_people_can_read(name):
    model, (rows, tokenised) = build(name), raw(name)
    same(name, model, mask_fisher(model, rows, tokenizer=tokenizer(), **QUIET), brute(name, model, tokenised))

def listed(labels):
    "Rows of which each lists the classes that it has, by the type of its column."
    types = Features(dict(text=Value('string'), labels=Sequence(ClassLabel(names=['a', 'b', 'c', 'd']))))
    return Dataset.from_dict(dict(text=['a b', 'c'][:len(labels)], labels=labels), types)

def test_a_list_of_classes_is_not_a_list_of_zeros_and_ones():
    model, how = build('several'), dict(tokenizer=tokenizer()) | QUIET
    same('several', model, mask_fisher(model, listed([[1, 2], [0]]), **how), brute('several', model, raw('several')[1]))
    for row in ([0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]):
        said = f'the labels of row 1 are {row}, a 0 or 1 for each class; expected a list of its classes, {[i for i in range(4) if row[i]]}'
        with pytest.raises(ValueError, match=said.replace('[', r'\[')): mask_fisher(model, listed([[3], row]), **how)

def test_answers_that_are_cut_off_are_counted():
    gone, none = dict(text=['d e']), dict(text=[], answer_start=[])
    rows = [dict(question='a', context='a b c d e a d e', answers=o) for o in (none, dict(text=['a b'], answer_start=[0]), gone | dict(text=['e a'], answer_start=[8]), gone | dict(answer_start=[12]))]
    model, how = build('questions'), dict(tokenizer=tokenizer()) | QUIET
    with pytest.warns(UserWarning) as said: mask_fisher(model, Dataset.from_list(rows), max_length=5, **how)
    assert [str(o.message) for o in said] == ['2 of 3 answers, the first of row 2, are not among the first 5 tokens, and count as none, at token 0']
    with pytest.warns(UserWarning, match='1 of 1 answers, the first of row 3, are'): mask_fisher(model, Dataset.from_list([*rows[:1]*3, rows[3]]), max_length=6, **how)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mask_fisher(model, Dataset.from_list(rows), **how)

def test_a_masked_language_model_hides_words_by_row():
    model, texts = build('masked'), ['a b c d e a b c', 'd e', 'b']
    rows = Dataset.from_list([dict(text=o) for o in texts])
    one, again = [mask_fisher(model, rows, tokenizer=tokenizer(), batch_tokens=n, **QUIET) for n in (1, 1000)]
    assert_close(one.heads, again.heads, rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match='BertForMaskedLM is a masked language model, whose labels are tokens, but the rows have .label.; is the model fine-tuned'):
        mask_fisher(model, rows.add_column('label', [0, 1, 0]), tokenizer=tokenizer(), **QUIET)
    with pytest.raises(ValueError, match='needs `labels`, or a tokenizer with a mask token'): mask_fisher(model, rows, tokenizer=tokenizer(mask_token=None), **QUIET)

def test_prompts_are_not_predicted_and_messages_follow_the_template():
    model, made = build('writer-llama'), tokenizer(eos_token='[SEP]')
    v = {w: i for i, w in enumerate(words.WORDS)}
    want = dict(input_ids=[v['a'], v['b'], v['c'], v['[SEP]']], labels=[IGNORED, IGNORED, v['c'], v['[SEP]']])
    given = Dataset.from_list([dict(prompt='a b', completion='c')])
    same('writer-llama', model, mask_fisher(model, given, tokenizer=made, **QUIET), brute('writer-llama', model, [want]))
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}[SEP]{% endif %}{% endfor %}"
    spoken = Dataset.from_list([dict(messages=[dict(role='user', content='a b'), dict(role='assistant', content='c')])])
    same('writer-llama', model, mask_fisher(model, spoken, tokenizer=made, **QUIET), brute('writer-llama', model, [want]))
    with pytest.raises(ValueError, match='the last of `messages` of row 0 is not of role `assistant`'):
        mask_fisher(model, Dataset.from_list([dict(messages=[dict(role='user', content='a')])]), tokenizer=made, **QUIET)

def test_tags_are_read_by_the_names_of_the_model():
    model, (rows, tokenised) = build('tags'), raw('tags')
    model.config.id2label = dict(enumerate(['I-Y', 'B-X', 'O', 'I-X', 'B-Y']))
    order = {0: 2, 1: 1, 2: 3, 3: 4, 4: 0}
    moved = [r | dict(labels=[order[o] for o in r['labels']]) for r in tokenised]
    with pytest.warns(UserWarning, match='labels are matched by name'): found = mask_fisher(model, rows, tokenizer=tokenizer(), **QUIET)
    same('tags', model, found, brute('tags', model, moved))


# --- refused --------------------------------------------------------------------------------

@pytest.mark.parametrize('name, change, say', [
    ('tags', lambda r: r | dict(labels=[7]*len(r['input_ids'])), 'label 7 of row 0 is not a class number from 0 to 4, or -100'),
    ('tags', lambda r: r | dict(labels=[1]), 'row 0 has 1 labels for 7 tokens'),
    ('tags', lambda r: r | dict(labels=[IGNORED]*len(r['input_ids'])), 'row 0 predicts nothing'),
    ('questions', lambda r: r | dict(end_positions=99), 'row 0 has its answer from 2 to 99; expected places in its 7 tokens'),
    ('questions', lambda r: {k: v for k, v in r.items() if k != 'end_positions'}, "the data set has no 'end_positions', of which a reader of questions learns"),
    ('choices', lambda r: r | dict(labels=3), 'label 3 of row 0 is not a class number from 0 to 2'),
    ('masked', lambda r: r | dict(labels=[60]*len(r['input_ids'])), 'label 60 of row 0 is not a token from 0 to 59'),
    ('writer-gpt2', lambda r: r | dict(input_ids=[5], labels=[5]), 'row 0 predicts nothing'),
    ('answers-t5', lambda r: dict(input_ids=r['input_ids']), 'has no `labels` or `label` column'),
    ('several', lambda r: r | dict(labels=[0, 1]), 'row 0 has 2 labels; expected 4'),
    ('several', lambda r: r | dict(labels=[0, 1, 2, 0]), 'label 2 of row 0 is not a class number from 0 to 1'),
    ('bce', lambda r: r | dict(labels=2), 'label 2 of row 0 is not a class number from 0 to 1'),
    ('images', lambda r: r | dict(labels=3), 'label 3 of row 0 is not a class number from 0 to 2')])
def test_wrong_rows_are_named(name, change, say):
    rows = Dataset.from_list([change(r) for r in rows_of(name, 2)])
    for run in (mask_fisher, evaluate):
        with pytest.raises(ValueError, match=say): run(build(name), rows, **loss_of(name), **QUIET)

def test_choices_that_a_head_does_not_have():
    rows = Dataset.from_list(rows_of('several'))
    for name, how, say in [('several', dict(loss='bce'), "`loss` 'bce' is for a classifier with one output; .* has 4"), ('tags', dict(loss='bce'), 'is for a classifier with one output'),
                           ('bce', dict(loss='mse'), '`loss` is .mse.; expected one of'), ('bce', dict(loss='bce', reduction='mean'), 'of which this loss has one'), ('several', dict(reduction='max'), '`reduction` is .max.; expected one of')]:
        with pytest.raises(ValueError, match=say): mask_fisher(build(name), rows, **how, **QUIET)

def test_losses_that_need_other_rows_are_refused():
    model, rows = build('bce'), Dataset.from_list(rows_of('bce'))
    def contrast(model, batch):
        z = model(**{k: v for k, v in batch.items() if k != 'labels'}, output_hidden_states=True).hidden_states[-1][:, 0]
        return torch.nn.functional.cross_entropy(z@z.T, torch.arange(len(z)), reduction='none')
    def by_chance(model, batch): return model(**{k: v for k, v in batch.items() if k != 'labels'}).logits.square().sum(1)*(1+torch.rand(()))
    for loss in (contrast, by_chance):
        with pytest.raises(ValueError, match=r'the loss of row \d changes with the other rows, or by chance'): mask_fisher(model, rows, loss=loss, **QUIET)


# --- a body of which some models have more --------------------------------------------------

def test_a_classifier_and_a_tagger_of_one_body(tmp_path):
    "The tagger has no pooler: that is averaged over the two that have one; in memory, from files, saved and loaded."
    models = {'tags': build('tags', 0, torch.float32), 'several': build('several', 1, torch.float32), 'bce': build('bce', 2, torch.float32)}
    for t, m in models.items(): m.save_pretrained(tmp_path/t)
    data = {'tags': Dataset.from_list(rows_of('tags')), 'several': Dataset.from_list(rows_of('several')), 'bce': Dataset.from_list([{**r, 'labels': float(r['labels'])} for r in rows_of('bce')])}
    fishers = {t: mask_fisher(m, data[t], **QUIET) for t, m in models.items()}
    λ = dict(tags=1., several=3., bce=1.)
    merged = merge(models, fishers, weights=λ, **QUIET)
    merge_files({t: tmp_path/t for t in models}, fishers, weights=λ, out=tmp_path/'files', **QUIET)
    merged.save_pretrained(tmp_path/'merged')
    assert merged.report['not_in_all'] == {n: ['several', 'bce'] for n in ('pooler.dense.weight', 'pooler.dense.bias')}
    assert 'Not every model has' in (tmp_path/'merged'/'README.md').read_text()
    a, b = [models[t].bert.pooler.dense.weight.double() for t in ('several', 'bce')]
    assert_close(merged['several'].bert.pooler.dense.weight.double(), .75*a+.25*b, rtol=1e-6, atol=1e-8)
    value = sum(w/5*models[t].bert.encoder.layer[1].attention.self.value.weight.double() for t, w in λ.items())
    assert_close(merged['tags'].bert.encoder.layer[1].attention.self.value.weight.double(), value, rtol=1e-6, atol=1e-8)
    for other in (Merged.from_pretrained(tmp_path/'merged'), Merged.from_pretrained(tmp_path/'files')):
        for t, m in merged.items():
            assert type(other[t]) is type(models[t]) and other[t].bert is other.body
            for n, p in m.named_parameters(): assert torch.equal(p, other[t].get_parameter(n)), (t, n)
            assert evaluate(other[t], data[t], **QUIET) == evaluate(m, data[t], **QUIET)

def test_a_layer_that_one_model_lacks_is_refused():
    with pytest.raises(ValueError, match='models cannot be merged: num_hidden_layers is 2'):
        short = BertForSequenceClassification(BertConfig(**SIZE | dict(num_hidden_layers=1))).double()
        merge(dict(a=build('tags'), b=short), method='average')

def test_a_model_merged_with_its_head_and_one_that_keeps_it_are_named():
    models = dict(s=BertForSequenceClassification(BertConfig(**SIZE)), m=BertForMaskedLM(BertConfig(**SIZE)))
    said = r"^models cannot be merged: 'm' \(BertForMaskedLM\) is merged with its head, but of 's' \(BertForSequenceClassification\) only the body is$"
    for order in (models, dict(reversed(models.items()))):
        with pytest.raises(ValueError, match=said): merge(order, method='average')

@pytest.mark.parametrize('cls,kind', [(BertForQuestionAnswering, 'reader of questions'), (BertForMultipleChoice, 'multiple choice')])
def test_what_answers_otherwise_is_to_be_asked_alone(cls, kind):
    merged = merge(dict(s=BertForSequenceClassification(BertConfig(**SIZE)), o=cls(BertConfig(**SIZE))), method='average')
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(ValueError, match=rf"the answers of 'o' \({kind}\) are not the logits of one text; ask it alone, as `merged\['o'\]\(\*\*inputs\)`"):
        merged.logits(input_ids=ids)
    merged['o'](input_ids=ids[None] if cls is BertForMultipleChoice else ids) # as it says

def test_ids_of_several_texts_are_refused_by_the_shape_that_is_expected():
    merged = merge(dict(s=BertForSequenceClassification(BertConfig(**SIZE))), method='average')
    with pytest.raises(ValueError, match=r'is \(1, 2, 3\) of torch.int64; expected whole numbers of shape \(rows, tokens\)'):
        merged.logits(input_ids=torch.tensor([[[5, 6, 7], [8, 9, 10]]]))

@pytest.mark.parametrize('method', ['average', 'task-arithmetic', 'ties', 'dare', 'fisher', 'regmean'])
def test_every_method_leaves_the_pooler_to_those_that_have_it(method):
    models = {'tags': build('tags'), 'several': build('several', 1)}
    how = dict(base=build('tags', 5).bert) if method in ('task-arithmetic', 'ties', 'dare') else {}
    if method in ('fisher', 'regmean'): how['data'] = {t: Dataset.from_list(rows_of(t)) for t in models}
    merged = merge(models, method=method, **how, **QUIET)
    assert torch.equal(merged.body.pooler.dense.weight, models['several'].bert.pooler.dense.weight)


# --- implementations of attention -----------------------------------------------------------

@pytest.mark.parametrize('name', ['tags', 'tags-distilbert', 'writer-gpt2', 'writer-llama', 'answers-bart', 'images', 'sounds'])
def test_eager_and_sdpa_agree(name):
    model, data = build(name), Dataset.from_list(rows_of(name))
    model.set_attn_implementation('sdpa')
    sdpa = mask_fisher(model, data, **QUIET)
    model.set_attn_implementation('eager')
    eager = mask_fisher(model, data, **QUIET)
    for k, layers in sdpa.kinds.items():
        for a, b in zip(layers, eager.kinds[k]): assert_close(a, b, rtol=1e-5, atol=1e-8*b.max().item()) # some take their softmax in float32


# --- losses of one's own ----------------------------------------------------------------------

def own_fisher(model, batches, loss):
    "Literal masks, one example alone, of the caller's loss."
    found = {}
    for block in find_nodes(model):
        site, total = block.site, 0
        bias = site.module.bias if site.side == 'output' and site.module.bias is not None else 0
        for b in batches:
            masks = torch.ones(site.nodes, dtype=torch.float64, requires_grad=True)
            def masked(x, m=masks): return (x-bias)*m.repeat_interleave(block.size)+bias
            before, after = site.module.register_forward_pre_hook, site.module.register_forward_hook
            handle = before(lambda m, args: (masked(args[0]), *args[1:])) if site.side == 'input' else after(lambda m, args, z: masked(z))
            try: total = total+torch.autograd.grad(loss(model, b)[0], masks)[0]**2
            finally: handle.remove()
        found[block.name] = total/len(batches)
    return found

def test_contrast_with_a_bank_that_is_constant():
    "Other rows' embeddings are constants, worked out beforehand; as negatives with a gradient they are refused, see above."
    model, rows = build('pairs'), rows_of('pairs', 5)
    bank = torch.randn(7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    def loss(model, batch):
        mask = batch.get('attention_mask', torch.ones_like(batch['input_ids']))
        states = model(input_ids=batch['input_ids'], attention_mask=mask).last_hidden_state
        z = (states*mask[:, :, None]).sum(1)/mask.sum(1, keepdim=True)
        return torch.nn.functional.cross_entropy(z@bank.T, batch['labels'].long(), reduction='none')
    rows = [dict(input_ids=r['input_ids'], labels=i) for i, r in enumerate(rows)]
    found = mask_fisher(model, Dataset.from_list(rows), loss=loss, **QUIET)
    same('pairs', model, found, own_fisher(model, [alone(r) for r in rows], loss))

def test_image_tower_against_texts_of_the_classes():
    "CLIP as the merging literature uses it: the texts of the classes are embedded once, and are constants."
    config = CLIPConfig(text_config=SIZE | DECODER, vision_config=VISION, projection_dim=8)
    torch.manual_seed(0)
    model = CLIPModel(config).double().eval()
    with torch.no_grad(): texts = model.get_text_features(input_ids=torch.tensor([[5, 6, 2], [7, 8, 2], [9, 4, 2]]), attention_mask=torch.ones(3, 3).long())
    texts = getattr(texts, 'pooler_output', texts)
    def loss(model, batch):
        z = model.visual_projection(model.vision_model(pixel_values=batch['pixel_values']).pooler_output)
        return torch.nn.functional.cross_entropy(z@texts.T, batch['labels'], reduction='none')
    rows = [alone(r) for r in rows_of('images-clip', 4)]
    whole = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    got = by_block(model, mask_fisher(model, [whole], loss=loss, **QUIET))
    vision = [o for o in find_nodes(model) if o.name.startswith('vision_model')]
    assert all((v == 0).all() for k, v in got.items() if k.startswith('text_model')) and len(vision) == 4
    for block in vision:
        masks = torch.ones(block.site.nodes, dtype=torch.float64, requires_grad=True)
        bias = block.site.module.bias if block.site.side == 'output' else 0
        def masked(x): return (x-bias)*masks.repeat_interleave(block.size)+bias
        before, after = block.site.module.register_forward_pre_hook, block.site.module.register_forward_hook
        handle = before(lambda m, args: (masked(args[0]), *args[1:])) if block.site.side == 'input' else after(lambda m, args, z: masked(z))
        try: want = sum(torch.autograd.grad(loss(model, r)[0], masks)[0]**2 for r in rows)/len(rows)
        finally: handle.remove()
        assert_close(got[block.name], want, rtol=1e-9, atol=1e-15)

def test_ctc_of_each_row():
    from transformers import Wav2Vec2ForCTC
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(type(CASES['sounds'][0]).from_dict(CASES['sounds'][0].to_dict() | dict(vocab_size=12, pad_token_id=0))).double().eval()
    def loss(model, batch):
        z = torch.log_softmax(model(input_values=batch['input_values']).logits, -1).transpose(0, 1)
        lengths, wanted = torch.full((z.shape[1],), len(z)), (batch['labels'] != IGNORED).sum(1)
        return torch.nn.functional.ctc_loss(z, batch['labels'].clamp(min=0), lengths, wanted, reduction='none')
    gen = torch.Generator().manual_seed(2)
    rows = [dict(input_values=torch.randn(1, 600, generator=gen, dtype=torch.float64), labels=torch.randint(1, 12, (1, 3), generator=gen)) for _ in range(3)]
    with pytest.raises(ValueError, match='Wav2Vec2ForCTC has no loss that is known; give your own `loss=`'): mask_fisher(model, rows, **QUIET)
    same('ctc', model, mask_fisher(model, [{k: torch.cat([r[k] for r in rows]) for k in rows[0]}], loss=loss, **QUIET), own_fisher(model, rows, loss))
