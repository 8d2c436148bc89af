"""Language models under a ceiling of memory: layers that run twice, logits where labels ask, weights that are placed, files of many shards."""
import json

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import words
import zoo
from fisher_nodes import Merged, evaluate, linear_grams, mask_fisher, merge, merge_files, parameter_fisher, predict
from fisher_nodes.app.cli import main
from fisher_nodes.core import blocks, heads
from fisher_nodes.core.checkpointing import find_layers, kept
from fisher_nodes.core.families import DECODERS, MIXTURES
from fisher_nodes.core.heads import IGNORED, head_of, piece_losses
from fisher_nodes.core.nodes import MaskGradients
from fisher_nodes.core.places import find_nodes
from fisher_nodes.engine import memory
from fisher_nodes.engine.guard import frozen_eval
from fisher_nodes.engine.measure import measure
from fisher_nodes.engine.memory import batch_budget, token_bytes
from fisher_nodes.engine.models import load_model
from fisher_nodes.merging import store

QUIET = dict(progress=False)
SIZE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
WRITERS = { # decoders whose logits are more than a matrix, and two that are not
    'llama': {}, 'gpt2': dict(n_embd=16, n_layer=2, n_head=4, n_positions=40), 'qwen3': dict(head_dim=6), 'gemma2': dict(head_dim=6, final_logit_softcapping=2.),
    'cohere': dict(logit_scale=.3), 'granite': dict(logits_scaling=4.), 'opt': dict(ffn_dim=24, word_embed_proj_dim=8), 'mixtral': dict(num_local_experts=4, experts_implementation='eager')}
FLOAT32 = ('llama', 'qwen3', 'gemma2', 'cohere', 'granite', 'mixtral') # norms in float32

def known(kind):
    if kind not in CONFIG_MAPPING: pytest.skip(f'this transformers has no {kind}')

def writer(kind='llama', dtype=torch.float64, seed=0, **more):
    known(kind)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZE | WRITERS.get(kind, {}) | more))
    with torch.no_grad():
        for p in model.parameters(): p += .2*torch.randn_like(p)
    return model.to(dtype).eval()

def rows(*lengths, prompt=2, seed=0):
    "Batches of two rows, padded, the prompt without labels."
    gen, found = torch.Generator().manual_seed(seed), []
    for a, b in zip(lengths[::2], lengths[1::2]):
        there = torch.arange(max(a, b)) < torch.tensor([[a], [b]])
        ids = torch.randint(4, 60, there.shape, generator=gen)*there
        labels = torch.where(there & (torch.arange(max(a, b)) >= prompt), ids, IGNORED)
        found.append(dict(input_ids=ids, attention_mask=there.long(), labels=labels))
    return found

DATA = rows(9, 5, 4, 7)

def same(a, b, **how):
    a, b = a.tensors(), b.tensors()
    assert a.keys() == b.keys()
    for k in a: assert_close(a[k], b[k], msg=lambda m: f'{k}: {m}', **how)


# --- layers that run twice ------------------------------------------------------------------

@pytest.mark.parametrize('name', zoo.ZOO)
def test_every_family_to_the_bit(name):
    model, batch = zoo.build(name), zoo.collate(zoo.examples(name))
    found = {}
    with frozen_eval(model):
        assert find_layers(model)
        for again in (False, True):
            with MaskGradients(model, checkpointing=again) as masks: found[again] = masks.per_example(zoo.losses(model, batch))
    assert found[True].keys() == found[False].keys()
    for kind, layers in found[False].items():
        for a, b in zip(found[True][kind], layers, strict=True): assert_close(a, b, rtol=0, atol=0)

def classifier():
    torch.manual_seed(0)
    config = BertConfig(**{k: v for k, v in SIZE.items() if k != 'num_key_value_heads'}, num_labels=3)
    return BertForSequenceClassification(config).double().eval()

CLASSES = [o | dict(labels=torch.tensor([0, 2])) for o in DATA]
def own(model, batch): return model(batch['input_ids'], batch['attention_mask']).logits.square().sum(1)

@pytest.mark.parametrize('how', [dict(labels='exact'), dict(labels='sampled', seed=3), dict(loss=own), dict(matrices='all'), dict(variant='released')], ids=lambda o: '-'.join(o))
def test_every_choice_to_the_bit(how):
    "With labels='exact' one forward pass serves a backward pass for each class, and layers run again in each."
    model = classifier()
    same(mask_fisher(model, CLASSES, checkpointing=True, **how, **QUIET), mask_fisher(model, CLASSES, **how, **QUIET), rtol=0, atol=0)

@pytest.mark.parametrize('dtype, precision', [(torch.float32, 'fp32'), (torch.float32, 'bf16'), (torch.bfloat16, None)])
def test_every_precision_to_the_bit(dtype, precision):
    model = classifier().to(dtype)
    for data in (CLASSES, CLASSES[:1]):
        same(mask_fisher(model, data, checkpointing=True, precision=precision, **QUIET), mask_fisher(model, data, precision=precision, **QUIET), rtol=0, atol=0)

def test_a_seq2seq_model():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)).double().eval()
    same(mask_fisher(model, DATA, checkpointing=True, **QUIET), mask_fisher(model, DATA, **QUIET), rtol=0, atol=0)

@pytest.mark.parametrize('checkpointing', [False, True])
def test_what_hooks_read_does_not_outlive_the_forward_pass(checkpointing):
    "The tensor of every site but the leaf is gone; without checkpointing all are there."
    model, seen = writer(), []
    sites = [o.site for o in find_nodes(model)]
    def note(x): seen.append(StorageWeakRef(x.untyped_storage()))
    with frozen_eval(model), MaskGradients(model, checkpointing=checkpointing) as masks:
        handles = [o.module.register_forward_hook(lambda m, args, z, o=o: note(z if o.side == 'output' else args[0])) for o in sites]
        out = model(DATA[0]['input_ids']).logits
        alive = [not o.expired() for o in seen]
        for h in handles: h.remove()
        masks.per_example(out.square().sum((1, 2)))
    assert alive == [True]+[not checkpointing]*(len(sites)-1)

def test_autograd_holds_a_fraction():
    "All that is kept of a deep model for the backward pass, weights aside; layers' inputs are counted by hand."
    model, held = writer(num_hidden_layers=12), {}
    for again in (False, True):
        saved = {}
        with frozen_eval(model), MaskGradients(model, checkpointing=again), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            model(**{k: DATA[0][k] for k in ('input_ids', 'attention_mask')})
        for p in model.parameters(): saved.pop(p.data_ptr(), None)
        held[again] = sum(o.numel() for o in saved.values())+again*12*DATA[0]['input_ids'].numel()*16
    assert held[True] < held[False]/5

@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_as_it_was(fails):
    model = writer()
    own = model.model.layers[1].forward
    model.model.layers[0].forward = replaced = lambda *args, **kw: type(model.model.layers[0]).forward(model.model.layers[0], *args, **kw)
    before = model.config.to_dict()
    def loss(model, batch):
        out = model(batch['input_ids'], batch['attention_mask'])
        assert out.past_key_values is None
        if fails: raise RuntimeError('in the middle')
        return (out.logits.square().sum(2)*batch['attention_mask']).sum(1)
    try: mask_fisher(model, DATA, loss=loss, checkpointing=True, **QUIET)
    except RuntimeError as e: assert fails and str(e) == 'in the middle'
    assert model.model.layers[0].forward is replaced and 'forward' not in vars(model.model.layers[1]) and model.model.layers[1].forward == own
    assert model.config.to_dict() == before and model.config.use_cache and all(p.requires_grad for p in model.parameters())
    assert not any(o._forward_hooks or o._forward_pre_hooks for o in model.modules())
    assert model(DATA[0]['input_ids']).past_key_values is not None

def test_a_cache_would_be_written_twice():
    "Why no cache is kept: what a layer wrote into it the first time is there when it runs again."
    model = writer(attn_implementation='eager').requires_grad_(False)
    def gradients(**how):
        with MaskGradients(model, checkpointing=True) as masks: return masks.per_example(model(DATA[0]['input_ids'], **how).logits.square().sum((1, 2)))
    assert gradients(use_cache=False)['head'][0].any()
    with pytest.raises(RuntimeError, match=r'size of tensor a \(18\) must match the size of tensor b \(9\)'): gradients(use_cache=True)

def test_writing_into_what_a_hook_reads_is_refused_too():
    model = writer()
    up = model.model.layers[1].mlp.up_proj
    for again in (False, True):
        with frozen_eval(model), MaskGradients(model, checkpointing=again) as masks:
            handle = up.register_forward_hook(lambda m, args, z: z.mul_(2))
            losses = model(DATA[0]['input_ids']).logits.square().sum((1, 2))
            with pytest.raises(ValueError, match="writes into what block 'model.layers.1.mlp' masks"): masks.per_example(losses)
            handle.remove()

def test_random_layers_run_again_with_the_same_draws():
    "A model that draws in evaluation mode is refused elsewhere; here nothing else may go wrong with it."
    model = classifier()
    model.bert.encoder.layer[1].output.dropout = torch.nn.Dropout(.5)
    def gradients(again, seed=1):
        with frozen_eval(model), MaskGradients(model, checkpointing=again) as masks:
            model.bert.encoder.layer[1].output.dropout.train()
            torch.manual_seed(seed)
            return masks.per_example(own(model, CLASSES[0]))['head'][0]
    assert_close(gradients(True), gradients(False), rtol=0, atol=0)
    once, twice = gradients(True), gradients(True, 2)
    assert (once-twice).norm() > .01*once.norm() # it does draw

def test_kept_may_be_asked_for_outside_of_a_backward_pass():
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(kept(x)(), x) and not kept(x)().requires_grad


# --- logits where labels ask ----------------------------------------------------------------

def seen_by_head(model, call):
    "Shapes of what the output embeddings read."
    shapes = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    try: call()
    finally: handle.remove()
    return shapes

def test_logits_of_prompts_and_padding_are_not_made():
    model = writer()
    data = rows(9, 5, prompt=6)[:1] + rows(8, 8, prompt=6)
    data[0]['labels'][1, 3] = 7 # the second row is shorter than the prompt of the first
    shapes = seen_by_head(model, lambda: mask_fisher(model, data, **QUIET))
    assert shapes == [(2, 4, 16), (1, 1, 16), (2, 2, 16)] # places 2, 5, 6, 7; one row by itself, for the check; places 5, 6
    assert seen_by_head(model, lambda: evaluate(model, data, **QUIET)) == [(2, 4, 16), (2, 2, 16)]
    assert seen_by_head(model, lambda: predict(model, data, **QUIET)) == [(2, 9, 16), (2, 8, 16)]

@pytest.mark.parametrize('how', [{}, dict(reduction='mean'), dict(reduction='per-token'), dict(labels='sampled', seed=2)], ids=str)
def test_the_same_as_from_all_logits(how, monkeypatch):
    model = writer('gpt2')
    few = mask_fisher(model, DATA, **how, **QUIET), evaluate(model, DATA, **QUIET)
    monkeypatch.setattr(heads, 'can_choose', lambda model: False)
    same(few[0], mask_fisher(model, DATA, **how, **QUIET), rtol=1e-9, atol=0)
    assert evaluate(model, DATA, **QUIET) == pytest.approx(few[1], rel=1e-9)
    assert seen_by_head(model, lambda: mask_fisher(model, DATA, **how, **QUIET))[0] == (2, 9, 16)

@pytest.mark.parametrize('kind', WRITERS)
def test_pieces(kind, monkeypatch):
    "Two places at a time; the body runs once, whatever the family does to its logits."
    model, calls = writer(kind), []
    monkeypatch.setattr(heads, 'PIECE', 2*2*60)
    body = model.get_decoder()
    def count(*_): calls.append('body')
    handle = body.register_forward_hook(count)
    shapes = seen_by_head(model, lambda: mask_fisher(model, DATA[:1], checkpointing=True, **QUIET))
    handle.remove()
    # 7 places in pieces of two; three pieces once more in the backward pass; then the shorter row, in pieces of four
    assert [o for o in shapes if o[0] == 2] == [(2, 2, shapes[0][2])]*3+[(2, 1, shapes[0][2])]+[(2, 1, shapes[0][2])]+[(2, 2, shapes[0][2])]*2 and calls == ['body']*2
    for how in ({}, dict(reduction='mean'), dict(reduction='per-token')):
        same(mask_fisher(model, DATA, checkpointing=True, **how, **QUIET), mask_fisher(model, DATA, **how, **QUIET), rtol=1e-5 if kind in FLOAT32 else 1e-9, atol=0)

def test_every_decoder_in_the_table_answers_in_pieces():
    missing = []
    for kind in {**DECODERS, **MIXTURES}:
        case = next(o for k, o in zoo.ZOO.items() if o[0] == kind)
        config = CONFIG_MAPPING[kind](**case[1]) if kind in CONFIG_MAPPING else None
        if config is None or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING: continue
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').double().eval()
        head, batch = head_of(model), dict(input_ids=torch.randint(4, 19, (2, 9)))
        batch['labels'] = torch.where(torch.arange(9) < 3, IGNORED, batch['input_ids'])
        with frozen_eval(model): whole, pieces = head.loss(head.logits(model, batch), head.labels(batch)), piece_losses(head, model, batch, 200)
        if pieces is None: missing.append(kind)
        else: assert_close(pieces, whole, rtol=1e-12, atol=0, msg=lambda m: f'{kind}: {m}')
    assert missing == []

def test_one_piece_is_no_piece(monkeypatch):
    model = writer()
    head = head_of(model)
    assert piece_losses(head, model, DATA[0]) is None and piece_losses(head, model, {k: v for k, v in DATA[0].items() if k != 'labels'}, 10) is None
    model = classifier()
    assert piece_losses(head_of(model), model, CLASSES[0], 1) is None


# --- how much fits --------------------------------------------------------------------------

def test_the_estimate_knows_vocabulary_and_layers():
    def sized(**o):
        with torch.device('meta'): return LlamaForCausalLM(LlamaConfig(**SIZE | o)).bfloat16()
    plain, less = [token_bytes(sized(vocab_size=50_000, num_hidden_layers=24), checkpointing=o) for o in (False, True)]
    assert plain == 24*8*(6*16+24)+50_000*(2*2+3*4) and less == 24*8*16+8*(6*16+24*4)
    bert = classifier().bert
    assert token_bytes(bert) == 8*2*3*(6*16+24) and token_bytes(bert, checkpointing=True) == 8*2*(3*16+6*16*2)

def test_a_batch_fits_into_what_is_free(monkeypatch):
    model = writer()
    for device, most in (('cpu', 4096),):
        for again in (False, True):
            for tokens in (7, 100, 10**6):
                monkeypatch.setattr(memory, 'free_memory', lambda device: tokens*token_bytes(model, checkpointing=again)+1)
                assert batch_budget(model, again) == min(tokens, most)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 0)
    assert batch_budget(model) == 1

def test_rows_are_batched_by_what_is_free(monkeypatch):
    "Little memory gives small batches and the same Fisher."
    from datasets import Dataset
    model, data = writer(), Dataset.from_list([dict(input_ids=[5, 6, 7, 8+i]) for i in range(6)])
    want = mask_fisher(model, data, **QUIET)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 8*token_bytes(model))
    shapes = seen_by_head(model, lambda: same(mask_fisher(model, data, **QUIET), want, rtol=1e-5, atol=0))
    assert [o for o in shapes if o[0] > 1] == [(2, 3, 16)]*3


# --- what is refused ------------------------------------------------------------------------

def test_what_runs_no_layer_twice_says_so(tmp_path):
    model, said = writer('gpt2'), '`checkpointing` is for mask Fishers, and '
    for name in ('full-fisher', 'grams'):
        with pytest.raises(ValueError, match=said): measure(name, model, DATA, checkpointing=True, **QUIET)
    for method in ('fisher', 'regmean'):
        with pytest.raises(ValueError, match=said): merge([model, model], data=[DATA, DATA], method=method, checkpointing=True, **QUIET)
    with pytest.raises(ValueError, match=said+'nothing is measured'): merge([model, model], method='average', checkpointing=True, **QUIET)
    with pytest.raises(ValueError, match=said): parameter_fisher(model, DATA, checkpointing=True)
    with pytest.raises(ValueError, match=r"measures nothing; it takes no \['checkpointing'\]"): merge_files(dict(a='a', b='b'), method='average', out=tmp_path, checkpointing=True)

def test_merged_the_same():
    models = {o: writer(seed=i, dtype=torch.float32) for i, o in enumerate('ab')}
    plain, less = [merge(models, data=dict.fromkeys('ab', DATA), num_samples=None, checkpointing=o, **QUIET) for o in (False, True)]
    for (n, a), (_, b) in zip(plain['a'].named_parameters(), less['a'].named_parameters(), strict=True): assert_close(a, b, rtol=1e-6, atol=0, msg=n)
    def asked(o): return {k: v for k, v in o.recipe.items() if k != 'result'}
    assert asked(less) == asked(plain) # how it ran is no part of what was asked

def test_from_the_shell(tmp_path, capsys):
    model = writer(vocab_size=len(words.WORDS), dtype=torch.float32, eos_token_id=3, bos_token_id=2)
    model.save_pretrained(tmp_path/'m')
    words.tokenizer().save_pretrained(tmp_path/'m')
    (tmp_path/'rows.jsonl').write_text('\n'.join(json.dumps(dict(text=o)) for o in ('a b c', 'b c d e a', 'e d')))
    line = ['fisher', str(tmp_path/'m'), '--data', str(tmp_path/'rows.jsonl')]
    assert not main([*line, '--out', str(tmp_path/'plain')]) and not main([*line, '--checkpointing', '--out', str(tmp_path/'less')])
    plain, less = [load_file(tmp_path/o) for o in ('plain', 'less')]
    assert plain.keys() == less.keys() and all(torch.equal(plain[k], less[k]) for k in plain)
    assert main(['merge', f'a={tmp_path/"m"}', f'b={tmp_path/"m"}', '--method', 'average', '--checkpointing', '--out', str(tmp_path/'out')]) == 2
    assert '--checkpointing is for measuring, but without --data nothing is measured' in capsys.readouterr().err


# --- models that are placed -----------------------------------------------------------------

PARTS = ['model.embed_tokens', 'model.norm', 'model.rotary_emb', 'lm_head', *[f'model.layers.{i}' for i in range(3)]]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('placed')/'m'
    writer(dtype=torch.float32).save_pretrained(path)
    return path

@pytest.mark.parametrize('device_map', ['auto', {'': 'cpu'}, dict.fromkeys(PARTS, 'cpu')], ids=str)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_placed_where_it_fits(folder, device_map, checkpointing):
    placed = LlamaForCausalLM.from_pretrained(folder, device_map=device_map)
    same(mask_fisher(placed, DATA, checkpointing=checkpointing, **QUIET), mask_fisher(load_model(folder), DATA, **QUIET), rtol=0, atol=0)

def test_hooks_of_accelerate_stand_beside_ours(folder, monkeypatch):
    "Its hooks replace `forward` of the model and of every layer; pieces must not run the body again."
    placed = dispatch_model(load_model(folder), dict.fromkeys(PARTS, 'cpu'), main_device='cpu', force_hooks=True)
    wrapped = [o.forward for o in find_layers(placed).values()]
    monkeypatch.setattr(heads, 'PIECE', 2*2*60)
    calls = []
    placed.model.register_forward_pre_hook(lambda m, args: calls.append(1))
    found = mask_fisher(placed, DATA[:1], checkpointing=True, **QUIET)
    assert len(calls) == 2 and [o.forward for o in find_layers(placed).values()] == wrapped # the batch, and a row by itself
    same(found, mask_fisher(load_model(folder), DATA[:1], **QUIET), rtol=1e-5, atol=0)

def offloaded(folder, tmp_path, how):
    if how == 'cpu': return cpu_offload(load_model(folder), execution_device='cpu')
    away = PARTS if how == 'all on disk' else ['model.layers.2']
    return LlamaForCausalLM.from_pretrained(folder, device_map=dict.fromkeys(PARTS, 'cpu') | dict.fromkeys(away, 'disk'), offload_folder=tmp_path/'off')

@pytest.mark.parametrize('how', ['cpu', 'disk', 'all on disk'])
def test_put_away_is_refused_with_what_to_do(folder, tmp_path, how):
    away = offloaded(folder, tmp_path, how)
    name = 'model.layers.2.self_attn.q_proj.weight' if how == 'disk' else 'model.embed_tokens.weight'
    for call in (mask_fisher, linear_grams):
        with pytest.raises(ValueError, match=f'the weights of {name!r} are offloaded, .*give a `device_map` of devices that hold the model, or load it on the CPU'): call(away, DATA, **QUIET)
    with pytest.raises(ValueError, match=f"model of 'task0': the weights of {name!r} are not in memory, .*give its folder"): merge([away, load_model(folder)], method='average', **QUIET)
    if how == 'all on disk' and transformers.__version__.startswith('5.0.'): return # it reads its mask where there are no numbers
    assert evaluate(away, DATA, **QUIET) == pytest.approx(evaluate(load_model(folder), DATA, **QUIET), rel=1e-5) # needs no gradient


# --- in shards, in bfloat16 -----------------------------------------------------------------

def qwen(seed, tied):
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=6, tie_word_embeddings=tied))
    with torch.no_grad():
        for p in model.parameters(): p += .2*torch.randn_like(p)
    return model.bfloat16().eval()

@pytest.fixture(params=[True, False], ids=['tied', 'untied'])
def shards(request, tmp_path):
    "Two models in many files, and their Fishers."
    folders = {o: tmp_path/o for o in 'ab'}
    for i, f in enumerate(folders.values()): qwen(i, request.param).save_pretrained(f, max_shard_size='4KB')
    return folders

def test_loaded_as_stored(shards):
    assert len(list(shards['a'].glob('*.safetensors'))) > 3
    model = load_model(shards['a'])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    fisher = mask_fisher(shards['a'], DATA, **QUIET)
    assert fisher.heads.dtype == torch.float32 and fisher.meta['dtype'] == 'torch.bfloat16' and fisher.meta['num_choices'] == sum((o['labels'] != IGNORED).sum().item() for o in DATA)
    same(mask_fisher(shards['a'], DATA, checkpointing=True, **QUIET), fisher, rtol=0, atol=0)
    wide = mask_fisher(model.float(), DATA, **QUIET)
    for k, v in wide.tensors().items(): assert (fisher.tensors()[k]-v).norm() < .1*v.norm(), k

def tensors(folder):
    "All that the files of an index hold."
    index = json.loads((folder/'model.safetensors.index.json').read_text())
    found = {f: load_file(folder/f) for f in set(index['weight_map'].values())}
    assert {n: f for f, o in found.items() for n in o} == index['weight_map']
    return {n: t for o in found.values() for n, t in o.items()}

def slow_merge(models, fishers):
    "Equation 5 row by row, for query, key, up and gate; the mean for all else."
    states = [dict(m.named_parameters()) for m in models]
    def mean(ws, ts): return sum(w*t.detach().float() for w, t in zip(ws, ts))
    merged = {}
    for n in states[0]:
        ts, part, layer = [s[n] for s in states], n.split('.')[-2], int(n.split('.')[2]) if '.layers.' in n else None
        kind, size = dict(q_proj=('head', 6), k_proj=('group', 6), up_proj=('row', 1), gate_proj=('row', 1)).get(part, (None, 0))
        if kind is None: merged[n] = mean([.5, .5], ts)
        else:
            F = torch.stack([f.kinds[kind][layer].double() for f in fishers])
            shares = (F/F.sum(0)).float()
            merged[n] = torch.stack([mean(shares[:, r//size], [t[r] for t in ts]) for r in range(len(ts[0]))])
    return merged

@pytest.mark.parametrize('max_shard_size', ['5GB', '3KB'])
def test_merged_from_shards_to_shards(shards, tmp_path, monkeypatch, max_shard_size):
    "Equal to a slow merge; read and written a few rows at a time; the index names every tensor once."
    monkeypatch.setattr(blocks, 'BLOCK', 1500)
    largest, read = [], store.TensorSlot.__getitem__
    def watch(self, r):
        rows = read(self, r)
        largest.append(rows.numel())
        return rows
    monkeypatch.setattr(store.TensorSlot, '__getitem__', watch)
    models = [load_model(o) for o in shards.values()]
    fishers = [mask_fisher(m, DATA, **QUIET) for m in models]
    for t, f in zip('ab', fishers): f.save(tmp_path/f'{t}.fisher')
    out = merge_files(shards, {t: tmp_path/f'{t}.fisher' for t in 'ab'}, out=tmp_path/'out', max_shard_size=max_shard_size, **QUIET)
    monkeypatch.undo()
    tied = models[0].lm_head.weight is models[0].model.embed_tokens.weight
    assert max(largest) < 60*16 # less than the embeddings
    again = Merged.from_pretrained(out)
    memory = merge(dict(zip('ab', models)), dict(zip('ab', fishers)), **QUIET)
    want = slow_merge(models, fishers)
    for t in 'ab':
        for n, p in memory[t].named_parameters(): assert torch.equal(p, again[t].get_parameter(n)) and p.dtype == torch.bfloat16
        for n, w in want.items():
            got = again[t].get_parameter(n)
            assert torch.equal(got, w.bfloat16()), n
        found = tensors(out/t)
        assert ('lm_head.weight' in found) == (not tied) and {k for k in found} >= set(want)
        plain = AutoModelForCausalLM.from_pretrained(out/t, dtype='auto')
        assert all(torch.equal(p, plain.get_parameter(n)) for n, p in again[t].named_parameters())
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    several = [o for o in out.glob('*.safetensors')]
    assert len(several) == 1 if max_shard_size == '5GB' else len(several) > 5 and all(o.stat().st_size < 6000 for o in several)
    if len(several) > 1: assert tensors(out).keys() == set(want)
    for o in several:
        with safe_open(o, 'pt') as f: assert f.metadata() == dict(format='pt')
