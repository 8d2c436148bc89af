"""A merge that is checked: what fits, what was changed, what was not looked at; bill and signature by their own libraries (`make plugins`)."""
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from fisher_nodes import MaskFisher, Merged, merge, run_recipe
from fisher_nodes.app.cli import main
from fisher_nodes.engine.files import BOM, MERGED, SIGNATURE, list_files
from fisher_nodes.merging.bom import bom_differences
from fisher_nodes.merging.run import merge_files
from fisher_nodes.merging.verify import as_lines, is_sound, verify_merge
from test_cli import save_model

HAS = all(find_spec(o) for o in ('cyclonedx', 'model_signing'))
needs_both = pytest.mark.skipif(not HAS, reason='cyclonedx-python-lib and model-signing not installed; `make plugins` makes an environment with them')
QUIET = dict(progress=False)

def make_keys(folder, name):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP384R1() if name == 'other' else ec.SECP256R1())
    (folder/f'{name}.pem').write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    (folder/f'{name}.pub').write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    (folder/f'{name}-locked.pem').write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b'word')))

def make_inputs(here):
    for i, t in enumerate('ab'):
        save_model(here/'in'/t, seed=i)
        MaskFisher(torch.full((2, 4), 1.+i), torch.full((2, 24), 2.-i), num_examples=3).save(here/'in'/f'{t}.safetensors')

def words(here, *more):
    "What is typed to merge the two."
    return ['merge', *[f'{t}={here}/in/{t}' for t in 'ab'], '--fisher', *[f'{t}={here}/in/{t}.safetensors' for t in 'ab'], '--weights', 'a=1', 'b=0.5', *map(str, more)]

@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    here = tmp_path_factory.mktemp('kept')
    make_inputs(here)
    if HAS:
        for o in ('mine', 'other'): make_keys(here, o)
    assert main(words(here, '--out', here/'out', *(['--bom', '--sign', here/'mine.pem'] if HAS else []))) == 0
    return here

@pytest.fixture
def here(kept, tmp_path):
    "All of it, to be spoilt."
    shutil.copytree(kept, tmp_path/'here')
    return tmp_path/'here'

def told(here, *more, inputs=True, key=HAS):
    "Exit status, what does not fit and what was not checked, by the JSON of the command; and the screen."
    found = verify_merge(here/'out', inputs=[here/'in'] if inputs else [], key=here/'mine.pub' if key else None, repeat='--repeat' in more)
    lines = as_lines(found)
    assert all(len(o) <= 80 for o in lines) and len(lines) <= 24, '\n'.join(lines)
    said = {state: [(o.what, o.says) for o in found if o.state == state] for state in ('does not fit', 'not checked')}
    assert is_sound(found) == (not said['does not fit'])
    return found, {o for o, _ in said['does not fit']}, {o for o, _ in said['not checked']}, '\n'.join(lines)

def test_all_fits(here, capsys):
    before = {o: o.read_bytes() for o in here.rglob('*') if o.is_file()}
    assert main(['verify', str(here/'out'), '--inputs', str(here/'in'), '--repeat', *(['--key', str(here/'mine.pub')] if HAS else [])]) == 0
    screen = capsys.readouterr().out
    _, wrong, unchecked, lines = told(here, '--repeat')
    assert screen.strip() == lines.strip() and not wrong and unchecked == (set() if HAS else {'bom', 'signature'})
    assert 'every bit the same' in ' '.join(screen.split()) and 'Fisher of b' in ' '.join(screen.split())
    assert {o: o.read_bytes() for o in here.rglob('*') if o.is_file()} == before, 'it writes nothing'

def test_what_was_not_looked_at_is_said(here):
    _, wrong, unchecked, _ = told(here, inputs=False, key=False)
    assert not wrong and unchecked == {'inputs', 'repeat', 'signature', *(() if HAS else ['bom'])}
    shutil.rmtree(here/'in'/'b')
    found, wrong, unchecked, lines = told(here, key=False)
    assert not wrong and 'inputs' in unchecked and 'model of b: not there any more' in lines
    assert told(here, '--repeat')[1] == {'repeat'}, 'asked for, and not done'

def test_a_repeat_without_inputs_is_not_checked(here, capsys):
    _, wrong, unchecked, lines = told(here, '--repeat', inputs=False, key=False)
    assert not wrong and 'repeat' in unchecked and 'give --inputs with the folders and files that were merged' in ' '.join(lines.split())
    assert main(['verify', str(here/'out'), '--repeat']) == 0
    (here/'out'/'config.json').write_text('{}')
    assert 'repeat' in told(here, '--repeat', inputs=False, key=False)[1], 'a file that does not fit is the reason, not what was not given'
    capsys.readouterr()

def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(['verify', str(tmp_path/'nowhere')]) == 2
    assert f'{tmp_path}/nowhere is not a merged model: there is no such folder' in capsys.readouterr().err
    (tmp_path/'empty').mkdir()
    assert main(['verify', str(tmp_path/'empty')]) == 2 and f'it has no {MERGED}' in capsys.readouterr().err

def test_the_report_has_what_hashlib_says(here):
    report = json.loads((here/'out'/MERGED).read_text())
    def sha(path): return dict(size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    for n, o in report['files'].items():
        if n != SIGNATURE: assert {k: o[k] for k in ('size', 'sha256')} == sha(here/'out'/n), n
    assert {o.relative_to(here/'out').as_posix() for o in (here/'out').rglob('*') if o.is_file()} == {*report['files'], MERGED}
    for t in 'ab':
        assert report['inputs']['Fisher'][t] == dict(file=sha(here/'in'/f'{t}.safetensors'))
        assert report['inputs']['model'][t].keys() >= {'config.json', 'model.safetensors', 'tokenizer.json'}
        for n, o in report['inputs']['model'][t].items(): assert o == sha(here/'in'/t/n)

def test_the_hub_reads_the_card(here):
    data = ModelCard.load(here/'out'/'README.md').data
    assert data.base_model_relation == 'merge' and data.base_model is None and data.library_name == 'transformers'

# --- what was changed -------------------------------------------------------------------------

def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

def edit(path, a, b):
    text = path.read_text()
    assert a in text
    path.write_text(text.replace(a, b, 1))

def swap_signature(here):
    "Signed again, all as it is, with a key of one's own."
    from fisher_nodes.merging.signature import sign_folder
    sign_folder(here/'out', here/'other.pem')

def list_as(here, name, said):
    "A line of the list, as somebody else would have it."
    report = json.loads((here/'out'/MERGED).read_text())
    report['files'][name] = said
    (here/'out'/MERGED).write_text(json.dumps(report))

TAMPERED = dict( # what is done, what it is found by, and a word of what is said
    weights=(lambda o: flip(o/'out'/'model.safetensors'), 'files', 'model.safetensors: its SHA-256 is'),
    head=(lambda o: flip(o/'out'/'a'/'model-00002-of-00002.safetensors'), 'files', 'a/model-00002'),
    card=(lambda o: edit(o/'out'/'README.md', 'license: other', 'license: mit'), 'files', 'README.md'),
    recipe=(lambda o: edit(o/'out'/'recipe.yml', 'b: 0.5', 'b: 0.6'), 'recipe', 'other weights'),
    source=(lambda o: edit(o/'out'/'recipe.yml', '../in/a', '../in/c'), 'files', 'recipe.yml'),
    tokenizer=(lambda o: edit(o/'out'/'tokenizer.json', '"', ' "'), 'files', 'tokenizer.json'),
    added=(lambda o: (o/'out'/'modeling_new.py').write_text('import os'), 'files', 'modeling_new.py is not listed'),
    added_below=(lambda o: (o/'out'/'a'/'pytorch_model.bin').write_text(''), 'files', 'a/pytorch_model.bin is not listed'),
    removed=(lambda o: (o/'out'/'b'/'config.json').unlink(), 'files', 'b/config.json is missing'),
    link=(lambda o: ((o/'out'/'config.json').unlink(), (o/'out'/'config.json').symlink_to(o/'in'/'a'/'config.json')), 'files', 'leaves its folder'),
    linked_folder=(lambda o: (o/'out'/'more').symlink_to('/etc'), 'files', 'more is not listed'),
    pipe=(lambda o: ((o/'out'/'config.json').unlink(), os.mkfifo(o/'out'/'config.json')), 'files', 'is a pipe'),
    report=(lambda o: edit(o/'out'/MERGED, '"method"', '"methods"'), 'report', 'is not a merge report'),
    digest=(lambda o: list_as(o, 'config.json', dict(size=3, sha256='../x')), 'files', 'config.json: there is no SHA-256'),
    escape=(lambda o: list_as(o, '../in/a/config.json', {}), 'files', 'the list in merge_report.json is empty, or is none'),
    emptied=(lambda o: edit(o/'out'/MERGED, '"files": {', '"files": {}, "others": {'), 'files', 'the list in merge_report.json is empty, or is none'),
    input=(lambda o: flip(o/'in'/'a'/'model.safetensors'), 'inputs', 'model of a: model.safetensors'),
    fisher=(lambda o: flip(o/'in'/'b.safetensors'), 'inputs', 'Fisher of b'))
SEALED = dict(
    signature=(swap_signature, 'signature', 'the key is not the one that signed it'),
    half=(lambda o: (o/'out'/SIGNATURE).write_text('{"verificationMaterial": {}}'), 'signature', ''),
    deep=(lambda o: (o/'out'/SIGNATURE).write_text('['*9999), 'signature', 'is not a signature'),
    unsigned=(lambda o: (o/'out'/SIGNATURE).unlink(), 'signature', 'there is none'),
    bill=(lambda o: edit(o/'out'/BOM, '"name": "a"', '"name": "c"'), 'bom', 'model:a'),
    no_bill=(lambda o: (o/'out'/BOM).unlink(), 'files', 'bom.cdx.json is missing'))

@pytest.mark.parametrize('case', [*TAMPERED, *(pytest.param(o, marks=needs_both) for o in SEALED)])
def test_what_was_changed_is_found(here, case, capsys):
    spoil, what, word = (TAMPERED | SEALED)[case]
    spoil(here)
    _, wrong, _, lines = told(here)
    assert what in wrong and word in ' '.join(lines.split()), lines
    if case not in ('signature', 'half', 'deep', 'unsigned', 'input', 'fisher', 'report'): assert ('signature' in wrong) == HAS, 'and none of it is as it was signed'
    assert main(['verify', str(here/'out'), '--inputs', str(here/'in'), *(['--key', str(here/'mine.pub')] if HAS else [])]) == 3
    assert 'Traceback' not in capsys.readouterr().err

def relisted(here):
    "One who changes a file, and the hashes with it."
    report = json.loads((here/'out'/MERGED).read_text())
    for n, o in report['files'].items(): report['files'][n] = {'tensors': o['tensors']} if 'tensors' in o else {}
    (here/'out'/MERGED).write_text(json.dumps(report))
    list_files(here/'out', MERGED)

@pytest.mark.parametrize('name', ['model.safetensors', 'a/model-00002-of-00002.safetensors'])
def test_hashes_that_were_changed_too(here, name):
    "A signature tells, and so does the same merge, made again."
    flip(here/'out'/name)
    if name == 'model.safetensors': # the same file, once more
        for t in 'ab': shutil.copyfile(here/'out'/name, here/'out'/t/'model-00001-of-00002.safetensors')
    relisted(here)
    assert told(here)[1] == ({'signature', 'bom'} if HAS else set())
    found, wrong, _, lines = told(here, '--repeat', key=False)
    assert 'repeat' in wrong and ('fingerprint' in lines or 'tensors differ' in lines)

def test_other_weights_of_the_same_fingerprint(here):
    "The report has weak fingerprints of tensors too; whoever changes all of these is found by the repeated merge, which names the tensor."
    tensors = load_file(here/'out'/'a'/'model-00002-of-00002.safetensors')
    tensors['classifier.bias'][0] += 1
    save_file(tensors, here/'out'/'a'/'model-00002-of-00002.safetensors', dict(format='pt'))
    from fisher_nodes.merging.store import hash_file
    relisted(here)
    report = json.loads((here/'out'/MERGED).read_text())
    report['files']['a/model-00002-of-00002.safetensors']['tensors'] = hash_file(here/'out'/'a'/'model-00002-of-00002.safetensors')
    (here/'out'/MERGED).write_text(json.dumps(report))
    if (here/'out'/BOM).exists(): (here/'out'/BOM).unlink(), relisted(here)
    found, wrong, _, lines = told(here, '--repeat', key=False)
    assert wrong == {'repeat'} and '1 tensors differ, such as a' in ' '.join(lines.split()), lines

def edit_json(path, change):
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))

def unsealed(here):
    "One who takes away bill and signature, so that only the hashes are left."
    for o in (BOM, SIGNATURE): (here/'out'/o).unlink(missing_ok=True)
    relisted(here)

def swap_words(path):
    def swap(o):
        words = o['model']['vocab']
        a, b = list(words)[5:7]
        words[a], words[b] = words[b], words[a]
    edit_json(path, swap)

def swap_labels(path): edit_json(path, lambda o: o.update(id2label={'0': 'class b', '1': 'class a'}, label2id={'class b': 0, 'class a': 1}))

SMALL = {'labels': ('a/config.json', swap_labels), 'activation': ('config.json', lambda o: edit(o, '"gelu"', '"relu"')), 'words': ('b/tokenizer.json', swap_words),
    'shared words': ('tokenizer.json', swap_words), 'more': ('a/chat_template.jinja', lambda o: o.write_text('{{ 1 }}')), 'less': ('a/tokenizer.json', lambda o: o.unlink())}

@pytest.mark.parametrize('case', SMALL)
def test_what_stands_beside_the_weights_is_repeated_too(here, case):
    name, change = SMALL[case]
    change(here/'out'/name)
    unsealed(here)
    assert told(here, key=False)[1] == set()
    _, wrong, _, lines = told(here, '--repeat', key=False)
    assert wrong == {'repeat'} and f'1 files differ, such as {name};' in ' '.join(lines.split()), lines

def test_versions_are_no_difference(here):
    for n in ('config.json', 'a/config.json'): edit_json(here/'out'/n, lambda o: o.update(transformers_version='5.0.0'))
    unsealed(here)
    assert told(here, '--repeat', key=False)[1] == set()

@pytest.mark.parametrize('name', ['model.safetensors', 'b/model-00001-of-00002.safetensors'])
def test_one_copy_of_the_body_is_another(here, name):
    "Each task's files are compared, and not only those that are loaded."
    from fisher_nodes.merging.store import hash_file
    data = (path := here/'out'/name).read_bytes()
    path.unlink(), path.write_bytes(data), flip(path)
    unsealed(here)
    edit_json(here/'out'/MERGED, lambda o: o['files'][name].update(tensors=hash_file(path)))
    _, wrong, _, lines = told(here, '--repeat', key=False)
    assert wrong == {'repeat'} and '1 tensors differ' in ' '.join(lines.split()), lines

def test_a_merge_of_other_files_is_repeated(here):
    "By rows of files, and in shards; and one that was loaded and saved."
    pair, fishers = {t: here/'in'/t for t in 'ab'}, {t: here/'in'/f'{t}.safetensors' for t in 'ab'}
    merge_files(pair, fishers, out=here/'shards', weights=[1, .5], max_shard_size='5KB', **QUIET)
    Merged.from_pretrained(here/'out').save_pretrained(here/'loaded')
    assert len([*(here/'shards').glob('*.safetensors')]) > 1
    for o in ('shards', 'loaded'): assert 'every bit the same' in verify_merge(here/o, inputs=[here/'in'], repeat=True)[-1].says, o

# --- hostile folders --------------------------------------------------------------------------

OPENED = []
def note(event, args):
    if OPENED and event == 'open' and isinstance(args[0], (str, bytes)): OPENED.append(os.path.realpath(os.fsdecode(args[0])))
    if OPENED and event in ('socket.connect', 'subprocess.Popen', 'os.system', 'os.exec', 'pickle.find_class'): OPENED.append(event)

def opened(f):
    "What is opened meanwhile, and what else happens that must not."
    if not getattr(opened, 'on', False): sys.addaudithook(note); opened.on = True
    OPENED.append('')
    try: f()
    finally: found = OPENED[1:]; OPENED.clear()
    return found

def test_only_what_was_given_is_read(here, tmp_path):
    "A recipe names a private place; files outside are opened neither without `--inputs` nor by those."
    shutil.copytree(here/'in'/'a', tmp_path/'private')
    edit(here/'out'/'recipe.yml', '../in/a', '../../private')
    relisted(here)
    for more in ({}, dict(inputs=[here/'in']), dict(inputs=[here/'in'], repeat=True), dict(inputs=[here/'in'], key=here/'mine.pub') if HAS else {}):
        found = opened(lambda: verify_merge(here/'out', **more))
        own = [here/'out', *more.get('inputs', ()), Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1], *map(Path, sys.path[1:]), Path('/proc'), Path('/dev'), Path('/etc/localtime'), here/'mine.pub']
        odd = [o for o in found if not any(Path(o) == p or Path(os.path.realpath(p)) in Path(o).parents for p in own)]
        assert found and not odd, odd
    lines = ' '.join(' '.join(as_lines(found)).split()) if (found := verify_merge(here/'out', inputs=[here/'in'], repeat=True)) else ''
    assert 'model of a: not in what --inputs names' in lines and 'repeat does not fit not begun' in lines

def test_a_link_among_inputs_is_not_followed(here, tmp_path):
    shutil.move(here/'in'/'a'/'model.safetensors', tmp_path/'elsewhere')
    (here/'in'/'a'/'model.safetensors').symlink_to(tmp_path/'elsewhere')
    _, wrong, _, lines = told(here)
    assert wrong == {'inputs'} and 'is a link to elsewhere' in ' '.join(lines.split())

def test_inputs_of_which_there_is_no_hash_are_not_loaded(here):
    "A report that leaves out the weights of a model cannot have others loaded in their place."
    report = json.loads((here/'out'/MERGED).read_text())
    del report['inputs']['model']['a']['model.safetensors']
    (here/'out'/MERGED).write_text(json.dumps(report))
    (here/'out'/BOM).unlink(missing_ok=True), relisted(here)
    flip(here/'in'/'a'/'model.safetensors')
    _, wrong, _, lines = told(here, '--repeat', key=False)
    assert wrong == {'repeat'} and 'model of a: no file of weights is listed' in ' '.join(lines.split())

@pytest.mark.parametrize('kind', ['model', 'Fisher'])
def test_inputs_that_the_report_leaves_out(here, kind):
    "What the recipe names gets its line."
    edit_json(here/'out'/MERGED, lambda o: o['inputs'][kind].pop('b'))
    unsealed(here)
    _, wrong, _, lines = told(here, key=False)
    assert wrong == {'inputs'} and f'{kind} of b: the recipe names it' in ' '.join(lines.split())

def test_a_file_of_an_input_that_has_no_hash(here):
    edit_json(here/'out'/MERGED, lambda o: o['inputs']['model']['b'].pop('tokenizer.json'))
    unsealed(here)
    _, wrong, unchecked, lines = told(here, key=False)
    assert not wrong and 'inputs' in unchecked and 'model of b: tokenizer.json would be read' in ' '.join(lines.split())

def test_a_list_that_is_not_of_version_1(here):
    "What has hashes of inputs had hashes of files."
    edit_json(here/'out'/MERGED, lambda o: o.pop('files'))
    _, wrong, _, lines = told(here, key=False)
    assert 'files' in wrong and 'lists inputs, and no files' in ' '.join(lines.split())

@pytest.mark.parametrize('some', [['model.safetensors'], None])
def test_a_list_with_fewer_hashes(here, some):
    unsealed(here)
    edit_json(here/'out'/MERGED, lambda o: [o['files'][n].pop('sha256') for n in some or [*o['files']]])
    if not some: flip(here/'out'/'model.safetensors')
    _, wrong, _, lines = told(here, key=False)
    assert wrong == {'files'} and 'there is no SHA-256 of it' in ' '.join(lines.split())

@pytest.mark.parametrize('name', ['.DS_Store', 'Thumbs.db', 'a/desktop.ini'])
def test_what_a_desktop_leaves_is_named(here, name):
    (here/'out'/name).touch()
    assert f'{name} is not listed' in told(here, key=False)[3]

def test_places_that_are_not_there(here, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(here))
    assert main(['verify', str(here/'out'), '--inputs', '~/in', *(['--key', '~/mine.pub'] if HAS else [])]) == 0
    assert 'model of b' in capsys.readouterr().out
    assert main(['verify', str(here/'out'), '--inputs', '~/in', 'nowhere']) == 2
    assert len((said := capsys.readouterr().err).splitlines()) == 1 and 'names nowhere; there is no such file or folder' in said

def test_a_huge_file_is_not_read(here):
    with open(here/'out'/'a'/'config.json', 'r+b') as f: f.truncate(2**42)
    with open(here/'out'/'extra.bin', 'wb') as f: f.truncate(2**42)
    _, wrong, _, lines = told(here)
    assert 'files' in wrong and f'it has {2**42} bytes' in ' '.join(lines.split())
    with open(here/'out'/'recipe.yml', 'r+b') as f: f.truncate(2**34)
    assert 'recipe' in told(here)[1]

def test_what_git_and_the_hub_leave_is_not_of_the_merge(here):
    (here/'out'/'.gitattributes').write_text('*.safetensors filter=lfs')
    (here/'out'/'.cache'/'huggingface').mkdir(parents=True)
    (here/'out'/'.cache'/'huggingface'/'x.metadata').touch()
    _, wrong, unchecked, lines = told(here)
    assert not wrong and 'fetched' in unchecked and '2 files of git or the Hub' in lines

def test_a_snapshot_of_the_hub_is_made_of_links(here):
    "Files in the cache of the Hub are links to blobs beside the snapshot."
    cache = here/'models--me--two'
    (cache/'blobs').mkdir(parents=True)
    for o in [o for o in (here/'out').rglob('*') if o.is_file()]:
        blob, place = cache/'blobs'/hashlib.sha256(o.read_bytes()).hexdigest(), cache/'snapshots'/('a'*40)/o.relative_to(here/'out')
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(o, blob), place.symlink_to(os.path.relpath(blob, place.parent))
    found = verify_merge(cache/'snapshots'/('a'*40), key=here/'mine.pub' if HAS else None)
    assert is_sound(found), as_lines(found)

@needs_both
def test_a_folder_that_is_a_link(here):
    (here/'link').symlink_to(here/'out')
    found = verify_merge(here/'link', key=here/'mine.pub')
    assert is_sound(found) and 'signature' in {o.what for o in found if o.state == 'fits'}, as_lines(found)

@pytest.mark.parametrize('said', [None, 'x', {'sha256': []}])
def test_a_list_of_other_things_is_found_and_no_error(here, said):
    "With a bill beside it, to which it is compared."
    (here/'out'/BOM).write_text('{}')
    list_as(here, 'config.json', said)
    assert {'files', 'bom'} <= told(here)[1]

def test_no_merge(tmp_path, capsys):
    assert main(['verify', str(tmp_path)]) == 2 and 'has no merge_report.json' in capsys.readouterr().err
    assert main(['verify', str(tmp_path/'no')]) == 2

def test_what_version_1_wrote_has_no_hashes(here):
    "Said, and neither passed nor refused."
    report = json.loads((here/'out'/MERGED).read_text())
    del report['inputs'], report['files']
    (here/'out'/MERGED).write_text(json.dumps(report))
    for o in (BOM, SIGNATURE): (here/'out'/o).unlink(missing_ok=True)
    _, wrong, unchecked, lines = told(here, key=False)
    assert not wrong and unchecked == {'files', 'bom', 'signature', 'inputs', 'repeat'}

# --- the libraries ----------------------------------------------------------------------------

@needs_both
def test_the_bill_is_of_its_schema_and_of_these_files(here):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    text = (here/'out'/BOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None
    bom = json.loads(text)
    assert (bom['bomFormat'], bom['specVersion'], bom['metadata']['component']['type']) == ('CycloneDX', '1.7', 'machine-learning-model')
    hashes = {o['bom-ref']: o['hashes'][0]['content'] for c in bom['components'] for o in (c, *c.get('components', ())) if 'hashes' in o}
    for ref, path in {'file:model.safetensors': 'out/model.safetensors', 'model:b/model.safetensors': 'in/b/model.safetensors', 'Fisher:a': 'in/a.safetensors'}.items():
        assert hashes[ref] == hashlib.sha256((here/path).read_bytes()).hexdigest()
    assert [o['name'] for o in bom['metadata']['component']['pedigree']['ancestors']] == ['a', 'b'] and str(here) not in text

LIES = dict(hash=lambda o: o['components'][0]['hashes'][0].update(content='0'*64), gone=lambda o: o['components'].pop(), twice=lambda o: o['components'].append(o['components'][0]),
    more=lambda o: o['components'].append({'type': 'file', 'name': 'x', 'bom-ref': 'x'}), ancestor=lambda o: o['metadata']['component']['pedigree'].clear(),
    tool=lambda o: o['metadata']['tools']['components'][0].update(version='9'), dependency=lambda o: o['dependencies'].clear(), licence=lambda o: o['metadata']['component'].update(licenses=[{'license': {'id': 'MIT'}}]),
    nested=lambda o: o['metadata']['component'].update(components=[{'type': 'library', 'name': 'x', 'bom-ref': 'x'}]), group=lambda o: o['metadata']['component'].update(group='me'),
    words=lambda o: o['components'][0].update(description='by me'), sha512=lambda o: o['components'][0]['hashes'].append({'alg': 'SHA-512', 'content': '0'*128}),
    services=lambda o: o.update(services=[{'name': 'x'}]), link=lambda o: o['components'][0].update(externalReferences=[{'type': 'website', 'url': 'http://x'}]),
    expression=lambda o: o['components'][0].update(licenses=[{'expression': 'MIT'}]), serial=lambda o: o.update(serialNumber='urn:uuid:'+'0'*8+'-0000-4000-8000-'+'0'*12),
    author=lambda o: o['metadata'].update(authors=[{'name': 'x'}]), family=lambda o: o['metadata']['component']['modelCard']['modelParameters'].update(architectureFamily='rnn'))

@needs_both
@pytest.mark.parametrize('lie', LIES)
def test_a_bill_that_lies(here, lie):
    "It is as listed, so it was written like that."
    bom = json.loads((here/'out'/BOM).read_text())
    LIES[lie](bom)
    (here/'out'/BOM).write_text(json.dumps(bom))
    relisted(here)
    found, wrong, _, lines = told(here, key=False)
    assert wrong == {'bom'} and bom_differences(bom, json.loads((here/'out'/MERGED).read_text()))

@needs_both
def test_a_bill_of_another_form(here):
    edit_json(here/'out'/BOM, lambda o: o['metadata']['component']['modelCard']['modelParameters'].update(task=1))
    relisted(here)
    assert 'it is not CycloneDX 1.7' in told(here, key=False)[3]

@needs_both
def test_a_wrong_key(here, capsys):
    shutil.copyfile(here/'other.pub', here/'mine.pub')
    _, wrong, _, lines = told(here)
    assert wrong == {'signature'} and 'does not fit the key is not the one that signed it\n' in re.sub(' +', ' ', lines)
    assert main(['verify', str(here/'out'), '--key', str(here/'mine.pem')]) == 2 and 'cannot be used as a public key' in capsys.readouterr().err
    assert main(['verify', str(here/'out'), '--key', str(here/'no.pub')]) == 2 and 'is not a file' in capsys.readouterr().err

@needs_both
def test_the_library_itself_accepts_the_signature(here):
    from model_signing import verifying
    verifying.Config().use_elliptic_key_verifier(public_key=here/'mine.pub').verify(here/'out', here/'out'/SIGNATURE)
    flip(here/'out'/'README.md')
    with pytest.raises(ValueError, match='README.md'): verifying.Config().use_elliptic_key_verifier(public_key=here/'mine.pub').verify(here/'out', here/'out'/SIGNATURE)

@needs_both
def test_no_network_and_nothing_elsewhere(here, monkeypatch):
    def no(*args, **kw): raise AssertionError('network')
    monkeypatch.setattr(socket.socket, 'connect', no)
    monkeypatch.setattr(socket, 'getaddrinfo', no)
    before = {o for o in here.rglob('*')}
    assert main(words(here, '--bom', '--sign', here/'mine.pem', '--out', here/'again')) == 0
    assert not told(here, '--repeat')[1]
    assert {o.relative_to(here).parts[0] for o in {*here.rglob('*')}-before} == {'again'}
    for n in (BOM, 'model.safetensors'): assert (here/'again'/n).read_text('latin1').replace('"again"', '"out"') == (here/'out'/n).read_text('latin1'), 'the same merge, the same bill'

@needs_both
def test_every_way_to_save(here):
    pair, fishers = {t: here/'in'/t for t in 'ab'}, {t: here/'in'/f'{t}.safetensors' for t in 'ab'}
    seal = dict(bom=True, sign=here/'mine.pem')
    merge_files(pair, fishers, out=here/'files', weights=[1, .5], **seal, **QUIET)
    merge(pair, fishers, weights=[1, .5], **QUIET).save_pretrained(here/'memory', **seal)
    run_recipe(here/'out'/'recipe.yml', here/'recipe', **seal, **QUIET)
    Merged.from_pretrained(here/'out').save_pretrained(here/'loaded', **seal)
    for o in ('files', 'memory', 'recipe', 'loaded'):
        found = verify_merge(here/o, key=here/'mine.pub', inputs=[here/'in'])
        assert is_sound(found) and 'signature' in {f.what for f in found if f.state == 'fits'}, as_lines(found)
    assert main(words(here, '--out', here/'out', '--overwrite')) == 0, 'a bill and a signature of the older one do not stay'
    assert not (here/'out'/BOM).exists() and not (here/'out'/SIGNATURE).exists() and not told(here, key=False)[1]

@needs_both
def test_scores_come_before_the_signature(here, capsys):
    (here/'rows.csv').write_text('sentence,label\nw1,0\nw2,1\n')
    line = ['evaluate', str(here/'out'), '--alone', '--update-card', '--data', f'a={here}/rows.csv', f'b={here}/rows.csv']
    assert main(line) == 2 and 'is signed, and with other scores' in capsys.readouterr().err and not told(here)[1]
    (here/'out'/SIGNATURE).unlink()
    assert main(line) == 0 and not told(here, key=False)[1]

@needs_both
@pytest.mark.parametrize('key,word', [('no.pem', 'is not a file'), ('mine.pub', 'as a private key'), ('mine-locked.pem', 'it is encrypted'), ('in/a/model.safetensors', 'as a private key'), ('new/key.pem', 'is not a file')])
def test_a_key_that_cannot_sign_is_refused_first(here, key, word, capsys):
    assert main(words(here, '--sign', here/key, '--out', here/'new')) == 2
    assert word in (said := capsys.readouterr().err) and len(said.splitlines()) == 1 and not (here/'new').exists()

@needs_both
@pytest.mark.parametrize('kind', ['an RSA', 'an Ed25519'])
def test_a_key_of_another_kind(here, kind, capsys):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
    key = rsa.generate_private_key(65537, 2048) if 'RSA' in kind else ed25519.Ed25519PrivateKey.generate()
    (here/'odd.pem').write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    (here/'odd.pub').write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    for line in (words(here, '--sign', here/'odd.pem', '--out', here/'new'), ['verify', str(here/'out'), '--key', str(here/'odd.pub')]):
        assert main(line) == 2
        assert f'it is {kind} key; expected one of an elliptic curve (secp256r1, ' in capsys.readouterr().err

@pytest.mark.parametrize('option', ['--bom', '--sign'])
def test_without_the_libraries(here, option, monkeypatch, capsys):
    for o in ('cyclonedx', 'cyclonedx.schema', 'cyclonedx.validation.json', 'cyclonedx.output.json', 'model_signing'): monkeypatch.setitem(sys.modules, o, None)
    (here/'key.pem').write_text('')
    assert main(words(here, *([option, here/'key.pem'] if option == '--sign' else [option]), '--out', here/'new')) == 2
    assert "fisher_nodes[provenance]" in capsys.readouterr().err and not (here/'new').exists()

def test_the_extras_are_optional():
    text = (Path(__file__).parents[1]/'settings.ini').read_text()
    assert not re.search(r'(?m)^requirements = .*(cyclonedx|model-signing)', text) and re.search(r'(?m)^provenance_requirements = .*cyclonedx.*model-signing', text)
