"""Adam's second moments as importance: names by the parameter itself, numbers by recursion, nodes against mask gradients, and what is refused."""
import json
import os

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig, T5Config, T5ForConditionalGeneration, Trainer,
                          TrainingArguments)

import zoo
from fisher_nodes import MaskFisher, ParameterFisher, mask_fisher, merge, merge_files, optimizer_fisher, optimizer_mask_fisher, parameter_fisher
from fisher_nodes.app.cli import main
from fisher_nodes.core.families import body_of
from fisher_nodes.engine.importance import expand_importance, importance_schema
from fisher_nodes.engine.optimizer import fold_nodes
from reference import examples, collate, ragged_batches, tiny
from test_cli import WORDS, save_model

QUIET,V = dict(progress=False),len(WORDS)

def quiet_args(folder, **kw):
    return TrainingArguments(str(folder), use_cpu=True, report_to='none', disable_tqdm=True, **kw)

def stepped(model, folder, batches, **kw):
    "The optimizer that `Trainer` makes for a model, after a step on each batch; its learning rate is 0."
    optimizer = Trainer(model, quiet_args(folder, learning_rate=0., weight_decay=.1, **kw)).create_optimizer()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer

def text(n=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [dict(input_ids=(ids := torch.randint(3, 60, (2, 6), generator=gen)), labels=ids.clone()) for _ in range(n)]

MODELS = {
    'bert': lambda: (tiny(dtype=torch.float32), ragged_batches()),
    'roberta, float64': lambda: (tiny('roberta'), ragged_batches('roberta')),
    'gpt2, tied': lambda: (AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=12)), text()),
    'llama, root mean square norms': lambda: (AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24)), text()),
    't5, shared words': lambda: (T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)), text())}

@pytest.mark.parametrize('name', MODELS)
def test_every_number_is_of_its_parameter(name, tmp_path):
    "The optimizer is at hand, so a state is found by the parameter itself; a Trainer of today wrote the order."
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    optimizer = stepped(model, tmp_path, batches)
    torch.save(optimizer.state_dict(), tmp_path/'optimizer.pt')
    found = optimizer_fisher(tmp_path/'optimizer.pt', model)
    for n, p in body_of(model).named_parameters():
        want = optimizer.state[p]['exp_avg_sq']/(1-.999**len(batches)) if p in optimizer.state else torch.zeros_like(p)
        assert_close(found.values[n], want, rtol=1e-5, atol=0, msg=n)
    assert found.meta['steps']==len(batches) and found.meta['estimator']=='adam' and found.num_examples==0
    different = {n: v.sum().item() for n, v in found.values.items() if v.any()}
    assert len(set(different.values()))==len(different)>5 # so that a swap of two would be seen

def test_the_numbers_are_a_moving_mean_of_squared_means(tmp_path):
    "By the recursion, written out, on batches of unequal size; with one row a batch it is a moving mean of Fishers of single rows."
    model, batches = tiny(), ragged_batches()
    torch.save(stepped(model, tmp_path, batches).state_dict(), tmp_path/'optimizer.pt')
    found, T = optimizer_fisher(tmp_path/'optimizer.pt', model), len(batches)
    share = torch.tensor([.001*.999**(T-1-t) for t in range(T)], dtype=torch.float64)
    params = dict(model.bert.named_parameters())
    grads = [torch.autograd.grad(model(**b).loss, [*params.values()]) for b in batches]
    for i, n in enumerate(params):
        want = sum(s*g[i]**2 for s, g in zip(share, grads))/share.sum()
        assert_close(found.values[n], want, rtol=1e-9, atol=0, msg=n)
    rows = [collate([o]) for o in examples(5)]
    model = tiny()
    torch.save(stepped(model, tmp_path, rows).state_dict(), tmp_path/'optimizer.pt')
    found = optimizer_fisher(tmp_path/'optimizer.pt', model)
    single = [parameter_fisher(model, [o], **QUIET).values for o in rows]
    share = torch.tensor([.999**(4-t) for t in range(5)], dtype=torch.float64)
    for n in params: assert_close(found.values[n], sum(s*f[n] for s, f in zip(share, single))/share.sum(), rtol=1e-6, atol=1e-30, msg=n)

FAMILIES = ['bert', 'distilbert', 'albert', 'gpt2', 'llama', 'gpt_neox', 'phi3', 'mixtral', 't5', 'bart', 'modernbert', 'deberta-v2', 'falcon', 'vit']

@pytest.mark.parametrize('name', [o for o in FAMILIES if o in zoo.ZOO])
def test_nodes_against_mask_gradients(name):
    """Of one example the gradient of a mask is the sum of weight times gradient, so with v = g/w the rule gives that sum itself;
    its square is the mask Fisher, which is found by other code, at the activations."""
    model = zoo.build(name).double()
    batch = zoo.alone(zoo.examples(name), 0)
    params = dict(body_of(model).named_parameters())
    def loss(model, batch): return zoo.losses(model, batch)
    grads = torch.autograd.grad(loss(model, batch).sum(), [*params.values()], allow_unused=True)
    odd = {n: torch.zeros_like(p) if g is None else g/p.detach() for (n, p), g in zip(params.items(), grads)}
    got = fold_nodes(ParameterFisher(odd), model)
    want = mask_fisher(model, [batch], loss=loss, **QUIET)
    assert got.kinds.keys()==want.kinds.keys()
    for kind, layers in want.kinds.items():
        assert sum(o.sum() for o in layers)>0
        for i, (a, b) in enumerate(zip(got.kinds[kind], layers)):
            top = b.max()
            assert_close(a.square(), b.to(a), rtol=1e-6, atol=1e-9*top.item(), msg=f'{kind} of layer {i}')

def test_enough_families_are_looked_at(): assert len([o for o in FAMILIES if o in zoo.ZOO])>=12


# --- layouts ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A model, its optimizer, and a checkpoint as `Trainer` leaves it."
    folder = tmp_path_factory.mktemp('made')
    save_model(folder/'start')
    model = AutoModelForSequenceClassification.from_pretrained(folder/'start')
    rows = examples(12, 2, vocab=V)
    trainer = Trainer(model, quiet_args(folder/'out', per_device_train_batch_size=3, max_steps=4, save_steps=2, logging_strategy='no'),
        train_dataset=rows, data_collator=collate)
    trainer.train()
    states = {n: trainer.optimizer.state[p]['exp_avg_sq'].clone() for n, p in model.named_parameters()}
    return folder, model.eval(), states, trainer.optimizer.state_dict()

def same(found, states, factor=1):
    for n, v in found.values.items(): assert_close(v, states[f'bert.{n}']*factor, rtol=1e-5, atol=0, msg=n)

@pytest.mark.parametrize('given', ['folder', 'file', 'folder and model', 'folder and folder'])
def test_a_checkpoint(made, given):
    folder, model, states, _ = made
    place = folder/'out'/'checkpoint-4'
    args = {'folder': [place], 'file': [place/'optimizer.pt'], 'folder and model': [place, model], 'folder and folder': [place, str(place)]}[given]
    found = optimizer_fisher(*args)
    same(found, states, 1/(1-.999**4))
    assert found.meta['weight_hash']==mask_fisher(model, [collate(examples(2, 2, vocab=V))], **QUIET).meta['weight_hash']

@pytest.mark.parametrize('suffix', ['', '.exp_avg_sq'])
def test_the_layout_of_ota(made, suffix, tmp_path):
    folder, model, states, _ = made
    save_file({n+suffix: v for n, v in states.items()}, tmp_path/'exp_avg_sq.safetensors')
    for path in (tmp_path, tmp_path/'exp_avg_sq.safetensors'):
        found = optimizer_fisher(path, model)
        same(found, states)
        assert found.meta['corrected'] is False and 'steps' not in found.meta
    save_file({n: v.bfloat16() for n, v in states.items() if n.startswith('bert.')}, tmp_path/'exp_avg_sq.safetensors') # heads are not needed
    assert optimizer_fisher(tmp_path, model).values['pooler.dense.bias'].dtype==torch.float32

def test_states_by_name(made, tmp_path):
    "As OTA writes a whole state, and as torch does where an optimizer was given names."
    folder, model, states, _ = made
    about = dict(betas=(.9, .999), lr=0.)
    torch.save(dict(state={n: dict(exp_avg_sq=v, step=torch.tensor(4.)) for n, v in states.items()}, param_groups=[about | dict(params=list(states))]), tmp_path/'o.pt')
    same(optimizer_fisher(tmp_path/'o.pt', model), states, 1/(1-.999**4))
    mixed = sorted(states) # an order of one's own
    torch.save(dict(state={i: dict(exp_avg_sq=states[n], step=4) for i, n in enumerate(mixed)},
        param_groups=[about | dict(params=[*range(len(mixed))], param_names=mixed)]), tmp_path/'o.pt')
    same(optimizer_fisher(tmp_path/'o.pt', model), states, 1/(1-.999**4))

def test_what_was_frozen(tmp_path):
    "In the model as it was trained it is frozen, and then it is 0; in one that was loaded it is not, and then nothing is guessed."
    model = tiny(dtype=torch.float32)
    model.bert.embeddings.requires_grad_(False)
    torch.save(stepped(model, tmp_path, ragged_batches()).state_dict(), tmp_path/'optimizer.pt')
    found = optimizer_fisher(tmp_path/'optimizer.pt', model)
    assert not found.values['embeddings.word_embeddings.weight'].any() and found.values['encoder.layer.0.output.dense.weight'].all()
    with pytest.raises(ValueError, match='exactly what was frozen then'): optimizer_fisher(tmp_path/'optimizer.pt', tiny(dtype=torch.float32))


# --- refusals ---------------------------------------------------------------------------------

def changed(o, **kw):
    "A state with one entry of its first parameter changed or, by None, gone."
    first = {k: v for k, v in ({**o['state'][0]} | kw).items() if v is not None}
    return dict(o, state={**o['state'], 0: first})

def group(o, **kw): return dict(o, param_groups=[{**g, **kw} for g in o['param_groups']])

BROKEN = {
    'no dictionary': (lambda o: [o], "does not hold what an optimizer's `state_dict` gives"),
    'a model': (lambda o: {'a': torch.zeros(2)}, "does not hold what an optimizer's `state_dict` gives"),
    'no steps': (lambda o: dict(o, state={}), 'the optimizer made no step'),
    'groups of words': (lambda o: dict(o, param_groups=['a']), "does not hold what an optimizer's"),
    'another order': (lambda o: dict(o, param_groups=o['param_groups'][::-1]), 'its optimizer has groups of'),
    'one group': (lambda o: dict(o, param_groups=[dict(o['param_groups'][0], params=[*range(41)])]), r'groups of \[41\] parameters'),
    'one parameter less': (lambda o: dict(o, param_groups=[dict(g, params=g['params'][:-1]) for g in o['param_groups']]), 'its optimizer has groups of'),
    'a state of none': (lambda o: dict(o, state={**o['state'], 99: o['state'][0]}), 'has a state for 99'),
    'Adafactor': (lambda o: changed(o, exp_avg_sq=None, exp_avg_sq_row=torch.ones(3)), 'has no `exp_avg_sq`, as Adam keeps it'),
    'eight bits': (lambda o: changed(o, exp_avg_sq=torch.ones(V, 16, dtype=torch.uint8)), 'word_embeddings.weight has numbers of type torch.uint8'),
    'another shape': (lambda o: changed(o, exp_avg_sq=torch.ones(16, V)), rf'word_embeddings.weight: shape \(16, {V}\), expected \({V}, 16\)'),
    'no step': (lambda o: changed(o, step=torch.tensor(0.)), 'has step .* expected a step of at least 1'),
    'not a number': (lambda o: changed(o, step=torch.tensor(float('nan'))), 'expected a step of at least 1'),
    'a beta of 1': (lambda o: group(o, betas=(.9, 1.)), 'betas from 0 to below 1'),
    'betas of words': (lambda o: group(o, betas='ab'), 'betas from 0 to below 1'),
    'negative': (lambda o: changed(o, exp_avg_sq=-torch.ones(V, 16)), 'word_embeddings.weight: -.* is among the numbers'),
    'infinite': (lambda o: changed(o, exp_avg_sq=torch.full((V, 16), float('inf'))), 'word_embeddings.weight: inf is among the numbers')}

@pytest.mark.parametrize('what', BROKEN)
def test_what_does_not_fit(made, what, tmp_path):
    folder, model, _, state = made
    change, says = BROKEN[what]
    torch.save(change(state), tmp_path/'optimizer.pt')
    for read in (optimizer_fisher, optimizer_mask_fisher):
        with pytest.raises(ValueError, match=says) as e: read(tmp_path/'optimizer.pt', model)
        assert '\n' not in str(e.value) and 'optimizer.pt' in str(e.value)

class Runs:
    def __reduce__(self): return os.system, ('touch ran',)

def test_a_pickle_is_not_run(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state={0: Runs()}, param_groups=[]), tmp_path/'optimizer.pt')
    with pytest.raises(ValueError, match='it holds more than tensors'): optimizer_fisher(tmp_path/'optimizer.pt', made[1])
    assert not (tmp_path/'ran').exists()

def test_places_that_hold_something_else(made, tmp_path):
    folder, model, states, state = made
    with pytest.raises(ValueError, match='it holds checkpoint-2, checkpoint-4, give one of them'): optimizer_fisher(folder/'out')
    with pytest.raises(ValueError, match='has no optimizer.pt and no exp_avg_sq.safetensors$'): optimizer_fisher(folder/'start')
    with pytest.raises(FileNotFoundError): optimizer_fisher(tmp_path/'none.pt', model)
    (tmp_path/'parts').mkdir()
    (tmp_path/'parts'/'global_step4').mkdir()
    with pytest.raises(ValueError, match='global_step4 is of DeepSpeed or FSDP'): optimizer_fisher(tmp_path/'parts', model)
    (tmp_path/'link').mkdir()
    (tmp_path/'link'/'optimizer.pt').symlink_to(folder/'out'/'checkpoint-4'/'optimizer.pt')
    with pytest.raises(ValueError, match='a link that leaves its folder'): optimizer_fisher(tmp_path/'link', model)
    torch.save(state, tmp_path/'alone.pt')
    with pytest.raises(ValueError, match='there is no model beside'): optimizer_fisher(tmp_path/'alone.pt')
    mask_fisher(model, [collate(examples(2, 2, vocab=V))], **QUIET).save(tmp_path/'m.safetensors')
    with pytest.raises(ValueError, match='is a saved MaskFisher, which `merge` takes as it is'): optimizer_fisher(tmp_path/'m.safetensors', model)
    for odd, says in ((dict(list(states.items())[1:]), r"missing \['bert.embeddings.word_embeddings.weight'\]"), (states | dict(more=torch.ones(2)), r"unknown \['more'\]")):
        save_file({n: v.contiguous() for n, v in odd.items()}, tmp_path/'o.safetensors')
        with pytest.raises(ValueError, match=says): optimizer_fisher(tmp_path/'o.safetensors', model)
    with pytest.raises(ValueError, match='`path`'): optimizer_fisher(3)

def test_the_optimizer_of_other_weights_is_refused(made):
    folder, model, _, _ = made
    with pytest.raises(ValueError, match='is of the weights beside it .* those of checkpoint-2 are'): optimizer_fisher(folder/'out'/'checkpoint-4', folder/'out'/'checkpoint-2')


# --- merging with it --------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pair(made):
    return {t: str(made[0]/'out'/f'checkpoint-{i}') for t, i in dict(a=2, b=4).items()}

def test_merges_are_by_the_formula(pair, tmp_path):
    "Element by element for all parameters, and row by row for nodes; from files and in memory the same."
    own = {t: AutoModelForSequenceClassification.from_pretrained(o).bert.state_dict() for t, o in pair.items()}
    full = {t: optimizer_fisher(o) for t, o in pair.items()}
    merged = merge(pair, full, method='fisher', floor=0., weights=[1, .5], **QUIET).body.state_dict()
    for n, v in full['a'].values.items():
        a, b = v.double(), .5*full['b'].values[n].double()
        want = (a*own['a'][n]+b*own['b'][n])/(a+b)
        there = (a+b)>0
        assert_close(merged[n][there], want[there].float(), rtol=1e-5, atol=1e-7, msg=n)
    nodes = {t: optimizer_mask_fisher(o) for t, o in pair.items()}
    merged = merge(pair, nodes, **QUIET)
    n = 'encoder.layer.1.intermediate.dense.weight'
    a, b = (o.rows[1].double()[:, None] for o in nodes.values())
    assert_close(merged.body.state_dict()[n], ((a*own['a'][n]+b*own['b'][n])/(a+b)).float(), rtol=1e-5, atol=1e-8)
    for t, o in nodes.items(): o.save(tmp_path/f'{t}.safetensors')
    merge_files(pair, {t: tmp_path/f'{t}.safetensors' for t in pair}, out=tmp_path/'out')
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path/'out'/'a')
    assert all(torch.equal(p, merged.body.state_dict()[n]) for n, p in again.bert.state_dict().items())
    assert expand_importance(nodes['b'], AutoModelForSequenceClassification.from_pretrained(pair['b'])).meta['estimator']=='adam'

def test_what_is_not_alike_is_not_merged(pair, made):
    nodes = {t: optimizer_mask_fisher(o) for t, o in pair.items()}
    model = AutoModelForSequenceClassification.from_pretrained(pair['b'])
    true = mask_fisher(model, [collate(examples(4, 2, vocab=V))], **QUIET)
    raw = MaskFisher(nodes['b'].heads, nodes['b'].rows, meta=nodes['b'].meta | dict(corrected=False))
    for other, word in ((true, 'estimator'), (raw, 'corrected')):
        with pytest.raises(ValueError, match=f'the Fishers differ in {word}'): merge(pair, dict(a=nodes['a'], b=other), **QUIET)
    with pytest.raises(ValueError, match='measured on other weights|other weights'): merge(pair, dict(a=nodes['b'], b=nodes['a']), **QUIET)


# --- the shell --------------------------------------------------------------------------------

def test_the_shell(pair, tmp_path, capsys):
    for t, o in pair.items():
        assert not main(f'fisher {o} --from-optimizer {o} --out {tmp_path}/{t}.safetensors --json'.split()), capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)=={'wrote': f'{tmp_path}/{t}.safetensors', 'estimator': 'adam'}
        assert not main(f'fisher {o} --from-optimizer {o}/optimizer.pt --parameters --out {tmp_path}/{t}.full.safetensors'.split())
        assert 'adam' in capsys.readouterr().out
    want = optimizer_mask_fisher(pair['a'])
    assert_close(MaskFisher.load(tmp_path/'a.safetensors').rows, want.rows, rtol=0, atol=0)
    want = optimizer_fisher(pair['a'])
    assert_close(ParameterFisher.load(tmp_path/'a.full.safetensors').values, want.values, rtol=0, atol=0)
    schema = Draft202012Validator(importance_schema())
    for path in tmp_path.glob('*.safetensors'):
        with safe_open(path, 'pt') as f: about = f.metadata()
        schema.validate(about | dict(meta=json.loads(about['meta'])))
    models = ' '.join(f'{t}={o}' for t, o in pair.items())
    def files(end): return ' '.join(f'{t}={tmp_path}/{t}{end}.safetensors' for t in pair)
    assert not main(f'merge {models} --fisher {files("")} --out {tmp_path}/masks'.split()), capsys.readouterr().err
    assert not main(f'merge {models} --method fisher --options floor=0 --fisher {files(".full")} --out {tmp_path}/full'.split()), capsys.readouterr().err

@pytest.mark.parametrize('words, says', [
    ('', 'give either --data or --from-optimizer'), ('--data d.csv --from-optimizer {o}', 'give either --data or --from-optimizer'),
    ('--from-optimizer {o} --num-samples 3', '--num-samples is not about --from-optimizer'), ('--data d.csv --parameters', '--parameters is not about --data'),
    ('--from-optimizer {o} --parameters --expand e', '--expand is for masks'),
    ('--from-optimizer {o}/config.json', 'is not read: it holds more than tensors')])
def test_the_shell_refuses(pair, words, says, tmp_path, capsys):
    assert main(f'fisher {pair["a"]} --out {tmp_path}/f {words.format(o=pair["a"])}'.split())==2
    said = capsys.readouterr().err
    assert says in said.splitlines()[-1] and 'Traceback' not in said and not (tmp_path/'f').exists()
