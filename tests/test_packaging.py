"""What `python -m build` makes: a small wheel that holds the package and nothing else, from an sdist that is enough to build it."""
import configparser
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip('setuptools', minversion='70.1', reason='setuptools, which builds the wheel, is not there; `make test` installs it')
BUILD = 'import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])'

def build(kind, project, out):
    "One file, as a build frontend makes it, without an environment of its own."
    done = subprocess.run([sys.executable, '-c', BUILD, kind, out], cwd=project, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return next(out.glob('*.whl' if kind == 'build_wheel' else '*.tar.gz'))

@pytest.fixture(scope='module')
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The sdist of a copy of the project, and the wheel made of that sdist alone."
    new = tmp_path_factory.mktemp('packaging')
    shutil.copytree(ROOT, new/'project', symlinks=True,
                    ignore=shutil.ignore_patterns('.*', '_[!_]*', 'nbs', 'tests', 'build', 'dist', '*.egg-info', '__pycache__'))
    shutil.copytree(ROOT/'fisher_nodes', new/'project'/'fisher_nodes', dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    sdist = build('build_sdist', new/'project', new)
    with tarfile.open(sdist) as o: o.extractall(new/'unpacked', filter='data')
    return sdist, build('build_wheel', next((new/'unpacked').iterdir()), new)

def names(wheel):
    with zipfile.ZipFile(wheel) as o: return set(o.namelist())

def metadata(wheel):
    with zipfile.ZipFile(wheel) as o: return message_from_string(o.read(next(n for n in o.namelist() if n.endswith('.dist-info/METADATA'))).decode())

def test_the_wheel_is_the_package(built):
    wanted = {o.relative_to(ROOT).as_posix() for o in (ROOT/'fisher_nodes').rglob('*') if o.is_file() and o.suffix != '.pyc'}
    assert {o for o in names(built[1]) if '.dist-info/' not in o} == wanted
    assert {'fisher_nodes/py.typed', 'fisher_nodes/__init__.pyi', 'fisher_nodes/importance.schema.json'} <= wanted

def test_wheel_and_sdist_are_small(built):
    assert [o.stat().st_size < 700_000 for o in built] == [True, True], [o.stat().st_size for o in built]

def test_metadata(built, settings):
    found = metadata(built[1])
    assert (found['Name'], found['Version'], found['Requires-Python']) == ('fisher_nodes', settings['version'], f'>={settings["min_python"]}')
    plain = [o for o in found.get_all('Requires-Dist') if 'extra' not in o]
    assert sorted(re.split('[<>=;]', o)[0] for o in plain) == sorted(re.split('[<>=;]', o)[0] for o in settings['requirements'].split())
    assert set(found.get_all('Provides-Extra')) == {o.removesuffix('_requirements') for o in settings if o.endswith('_requirements')}
    with zipfile.ZipFile(built[1]) as o: entries = o.read(next(n for n in o.namelist() if n.endswith('entry_points.txt'))).decode()
    assert 'fisher-nodes = fisher_nodes.app.cli:main' in entries

def test_links_of_the_readme_lead_somewhere_from_pypi(built, settings):
    "There are no files beside it there."
    text = metadata(built[1]).get_payload()
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    assert len(links) > 5 and [o for o in links if not o.startswith('https://')] == []
    user, repo, branch = (settings[o] for o in ('user', 'repo', 'branch'))
    assert f'](https://github.com/{user}/{repo}/blob/{branch}/nbs/00_method.ipynb)' in text
    assert f'](https://raw.githubusercontent.com/{user}/{repo}/{branch}/nbs/images/demo.png)' in text

def test_it_runs_from_the_wheel(built, tmp_path):
    code = 'import fisher_nodes, sys; from fisher_nodes.app.cli import main; print(fisher_nodes.__file__); main(["--version"])'
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(built[1])!r}); {code}'], cwd=tmp_path, capture_output=True, text=True)
    where, version = done.stdout.split()
    assert where.startswith(str(built[1])) and f'-{version}-' in built[1].name, done.stderr

def test_a_release_needs_no_password():
    jobs = yaml.safe_load((ROOT/'.github'/'workflows'/'release.yml').read_text(encoding='utf-8'))['jobs']
    assert jobs['publish']['permissions'] == {'id-token': 'write'} and jobs['publish']['needs'] == 'build'
    assert 'secrets' not in json.dumps(jobs) and 'password' not in json.dumps(jobs)
