"""The `kerasmed` command: thin over papermill and the package. Imports are inside, so that `--help` is quick."""

import contextlib
import sys
from pathlib import Path

import click

from kerasmed import __version__

ROOT_OPTIONS = {
    "data_root": click.option(
        "--data-root", default="", metavar="D", help="Folder of inputs [$KERASMED_DATA, else data/]."
    ),
    "models_root": click.option(
        "--models-root", default="", metavar="M", help="Folder of runs [$KERASMED_MODELS, else models/]."
    ),
}


class _Group(click.Group):
    """Ends with a message where a file or a value is wrong, whichever command meets it."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main():
    """Medical image classification in Keras: numbered notebooks, run end to end."""


@main.command("list")
@click.argument("notebooks", nargs=-1, metavar="[NB]...")
def list_(notebooks):
    """List notebooks with titles and budgets; with names, their parameters too."""
    from kerasmed import notebooks as nb

    for name in notebooks or nb.names():
        notebook = _usage(nb.describe, name)
        system = notebook.system or "any, by the parameter `system`"
        budgets = ", ".join(f"{profile} {minutes:g} min" for profile, minutes in notebook.budget_minutes.items())
        click.echo(
            f"{name}  {notebook.title}\n"
            f"    system {system}; {budgets} on 2 cores; {len(notebook.parameters)} parameters"
        )
        if notebooks:
            for parameter in notebook.parameters.values():
                click.echo(f"    {parameter.name} = {parameter.default!r}  ({parameter.type})  {parameter.help}")


@main.command()
@click.argument("notebooks", nargs=-1, required=True, metavar="NB...")
@click.option("--profile", default="full", show_default=True, help="Values of notebooks/params/PROFILE.")
@click.option("-p", "--parameter", "pairs", multiple=True, metavar="K=V", help="One parameter; may be repeated.")
@ROOT_OPTIONS["data_root"]
@ROOT_OPTIONS["models_root"]
@click.option("--force", is_flag=True, help="Run again what is finished already.")
@click.option("--timeout", type=int, metavar="S", help="Seconds that a cell may take [no limit].")
def run(notebooks, profile, pairs, data_root, models_root, force, timeout):
    """Run notebooks (or "all") through papermill, each into its run folder.

    A finished run of the same notebook, parameters, data and sources is not repeated; a killed one goes on. A failure
    is reported at the end and does not stop the others; the exit code is then 1.
    """
    from kerasmed import collection
    from kerasmed import notebooks as nb

    given = _given(pairs, data_root, models_root)
    wanted = nb.names() if notebooks == ("all",) else list(notebooks)
    described = [_usage(nb.describe, name) for name in wanted]
    plan = [
        (notebook, _usage(nb.resolve, notebook, profile=profile, given=given), notebook.name)
        for notebook in nb.quickest_first(described, profile)
    ]
    done, failed = _execute(plan, profile, force=force, timeout=timeout)
    for folder in done.values():
        _show(collection.collect(folder), folder)
    _end(plan, failed)


def _execute(plan, profile: str, *, force: bool, timeout: int | None) -> tuple[dict, dict]:
    """Run (notebook, parameters, label) one after the other; folders of those done, errors of others, by position."""
    from kerasmed import notebooks as nb
    from kerasmed import runs

    done, failed = {}, {}
    for position, (notebook, parameters, label) in enumerate(plan):
        minutes = notebook.budget_minutes.get(profile)
        budget = f", about {minutes:g} min on 2 cores" if minutes else ""
        tried = "" if label == notebook.name else f": {label}"
        click.secho(f"[{position + 1}/{len(plan)}] {notebook.name} ({profile}{budget}){tried}", bold=True)
        try:
            folder, executed = nb.run(notebook, parameters, force=force, timeout=timeout)
        except (RuntimeError, ValueError, OSError) as error:
            failed[position] = str(error)
            click.secho(f"failed: {error}", fg="red", err=True)
            continue
        if not executed:
            click.echo(f"finished already on {runs.status(folder)['finished']}; --force repeats it")
        done[position] = folder
    return done, failed


def _end(plan, failed: dict):
    """Name what failed, and exit with 1 if anything did."""
    if failed:
        labels = "; ".join(plan[position][-1] for position in failed)
        click.secho(f"{len(failed)} of {len(plan)} failed: {labels}", fg="red", err=True)
        sys.exit(1)


@main.command()
@click.argument("notebook", metavar="NB")
@click.option("--profile", default="full", show_default=True, help="Values of notebooks/params/PROFILE.")
@click.option("--grid", "grids", multiple=True, metavar="K=V,V", help="Values of a parameter to try; may be repeated.")
@click.option(
    "--grid-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML of parameter: [values]; --grid wins.",
)
@click.option("-p", "--parameter", "pairs", multiple=True, metavar="K=V", help="One parameter; may be repeated.")
@ROOT_OPTIONS["data_root"]
@ROOT_OPTIONS["models_root"]
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="CSV of the table [sweep-NB.csv].")
@click.option("--force", is_flag=True, help="Run again what is finished already.")
@click.option("--timeout", type=int, metavar="S", help="Seconds that a cell may take [no limit].")
def sweep(notebook, profile, grids, grid_file, pairs, data_root, models_root, out, force, timeout):
    """Run a notebook once for each combination of values, each into its run folder, and end in one table.

    The table is ordered by validation; test figures stand beside it and choose nothing. Every value is checked before
    the first run; a run that is finished is not repeated; one that fails does not stop the others.
    """
    from kerasmed import collection, runs
    from kerasmed import notebooks as nb

    described = _usage(nb.describe, notebook)
    common = _given(pairs, data_root, models_root)
    grid = _grid(grids, grid_file, common)
    tried = _usage(nb.points, grid)
    plan = [
        (described, _usage(nb.resolve, described, profile=profile, given={**common, **point}), label)
        for point, label in zip(tried, nb.labels(tried))
    ]
    out = out or Path(f"sweep-{notebook}.csv")
    with runs.whole(out) as temporary:  # a place that cannot be written to is better found before the work
        temporary.touch()
        done, failed = _execute(plan, profile, force=force, timeout=timeout)
        table = nb.sweep_table(tried, done, failed)
        table.to_csv(temporary, index=False)
    click.echo(f"\n{collection.as_text(nb.shown_of_sweep(table, list(grid))).to_string(index=False)}")
    click.echo(f"{len(table)} runs, best validation first; written to {out}")
    _end(plan, failed)


def _grid(grids, grid_file: Path | None, common: dict) -> dict:
    """Join --grid-file and --grid, which wins, into one grid; refuse a parameter that is given twice."""
    from kerasmed import notebooks as nb

    listed = [_usage(nb.parse_grid, text) for text in grids]
    grid = {**(_usage(nb.read_grid, grid_file) if grid_file else {}), **dict(listed)}
    if not grid:
        raise click.UsageError("nothing to sweep over; give --grid K=V,V or --grid-file.")
    names = [name for name, _ in listed]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"{name} is given in {names.count(name)} --grid; write all its values in one.")
    for name in grid:
        if name in common:
            raise click.UsageError(
                f"{name} is given both as {common[name]!r} (by -p or its own option) and as values to try, "
                f"{grid[name]!r} (by --grid or --grid-file); leave one of them out."
            )
    return grid


def _given(pairs, data_root: str, models_root: str) -> dict:
    """Join -p and the roots into given parameters."""
    roots = (("data_root", data_root), ("models_root", models_root))
    return dict(_usage(_pair, pair) for pair in pairs) | {
        name: str(Path(root).resolve()) for name, root in roots if root
    }


def _pair(pair: str):
    from kerasmed.notebooks import parse_value

    name, equals, value = pair.partition("=")
    if not equals:
        raise ValueError(f"-p {pair!r} is no assignment; write -p name=value.")
    return name, parse_value(value)


def _usage(function, *args, **kwargs):
    """Call a function whose ValueError or missing file is the user's to mend: exit 2."""
    try:
        return function(*args, **kwargs)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error


def _show(table, folder: Path):
    """Print a run's headline, numbers beside their baselines or sentences of a summary, and where its files are."""
    from kerasmed import runs

    click.echo()
    click.secho(f"{folder.name}: {table['status'].iloc[0]}, {table['data_source'].iloc[0]} data", bold=True)
    if (folder / "summary.json").exists():
        click.echo("\n".join(f"  {line}" for line in runs.read_json(folder / "summary.json")["headline"]))
    else:
        _show_numbers(table)
    near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    click.echo(f"  notebook  {near / 'notebook.ipynb'}\n  figures   {near / 'figures'}")


def _show_numbers(table):
    """Print rows of `collection.collect`, each beside its baseline."""
    from kerasmed.metrics import LOWER_IS_BETTER

    numbers = dict.fromkeys(("ci_low", "ci_high", "difference", "difference_low", "difference_high"), float)
    rows = table.astype(numbers).to_dict("records")
    widths = {name: max(least, *(len(row[name]) for row in rows)) for name, least in (("task", 11), ("label", 14))}
    for row in rows:
        metric, baseline = (row[name].replace("_", " ") for name in ("metric", "baseline"))
        metric += " (lower is better)" if row["metric"] in LOWER_IS_BETTER else ""
        click.echo(
            f"  {row['task']:<{widths['task']}} {row['label']:<{widths['label']}} {metric:<17} "
            f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]   {baseline} {row['baseline_value']:.3f}, "
            f"difference {row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
        )


@main.group()
def data():
    """Say what data are where, write synthetic sets, fetch public ones."""


@data.command("list")
@ROOT_OPTIONS["data_root"]
def data_list(data_root):
    """Say which systems' data lie under the data root, with their sources and licences."""
    from kerasmed import datasets, paths

    root = paths.data_root(data_root)
    for system in datasets.SYSTEMS:
        module = datasets.reader(system)
        home = module.folder(root)
        click.echo(
            f"{system}: "
            + (
                f"{datasets.kind(home)} data, {sum(1 for _ in datasets.files(home))} files in {home}"
                if home
                else f"none under {root}; expected {module.LAYOUT}"
            )
        )
        for part, (link, licence) in module.SOURCES.items():
            click.echo(f"    {part}: {link} ({licence})")


@data.command("synth")
@click.argument("system")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def data_synth(system, folder, seed):
    """Write a synthetic set of SYSTEM in its real layout into FOLDER, to be used as --data-root."""
    from kerasmed import datasets

    try:
        written = datasets.write_synthetic(system, folder, seed=seed)
    except (ValueError, FileExistsError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{system}: synthetic set in {written}; use it with --data-root {folder}")


@data.command("fetch")
@click.argument("system")
@ROOT_OPTIONS["data_root"]
def data_fetch(system, data_root):
    """Download SYSTEM's public sets with kagglehub (extra `data`) and lay them out under the data root."""
    from kerasmed import datasets, paths

    try:
        made = _usage(datasets.fetch, system, paths.data_root(data_root))
    except (ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(str(path) for path in made) or f"{system}: all there already")


@data.command("table")
@click.argument("system")
@click.option("--part", metavar="P", help="Which part, where the system has several.")
@click.option("--studies", "by_study", is_flag=True, help="A row a study, with its folder and how many images it has.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="CSV to write.")
@ROOT_OPTIONS["data_root"]
def data_table(system, part, by_study, out, data_root):
    """Write what the reader makes of SYSTEM's data as a CSV with a header: a row an image, or a row a study."""
    from kerasmed import datasets, paths, runs, studies

    module, root = _usage(datasets.reader, system), paths.data_root(data_root)
    parts = list(module.CLASS_NAMES)
    if part not in parts and (part or len(parts) > 1):
        raise click.UsageError(f"--part is {part!r}; expected one of {', '.join(parts)}.")
    if module.folder(root) is None:
        raise click.UsageError(f"no {system} data under {root}; expected {module.LAYOUT}.")
    part = part or parts[0]
    if by_study and hasattr(module, "read_studies"):  # whose labels are of the study to begin with
        table = _usage(module.read_studies, root)
    else:
        table = _usage(module.read, root, part)
        table = _usage(studies.table, table, module.CLASS_NAMES[part]) if by_study else table
    runs.write_table(out, table)
    what = "studies" if by_study else "series" if "series_id" in table else "images"
    click.echo(f"{len(table)} {what} of {system}, written to {out}")


@main.command()
@click.argument("system")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def check(system, folder):
    """Check SYSTEM's data in FOLDER (a data root): layout, labels, unreadable files. Exit 1 where anything is wrong."""
    from kerasmed import datasets, paths

    counts, problems = _usage(datasets.check, system, paths.data_root(folder))
    if len(counts):
        click.echo(
            counts.pivot_table(index=["part", "class"], columns="split", values="images", fill_value=0, sort=False)
            .astype(int)
            .to_string()
        )
    for row in problems.itertuples():
        click.echo(f"{row.part}: {row.file}: {row.problem}".replace(": :", ":"))
    click.echo(f"{len(problems)} problems" if len(problems) else "no problems")
    sys.exit(1 if len(problems) else 0)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    metavar="D",
    help="Folder that a manifest's paths are relative to, or lie in [the manifest's own].",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the report [audit-NAME].")
@click.option("--accept", "accepted", multiple=True, metavar="KIND", help="Let a kind of finding through the gate.")
@click.option(
    "--similarity",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.98,
    show_default=True,
    help="Correlation that makes a group where ids are unknown; 0 for no groups.",
)
def audit(path, data_root, out, accepted, similarity):
    """Look for copies, contradictions, leaks and shortcuts in PATH: a folder of images, or a manifest (CSV).

    A manifest's paths are relative to its own folder, or to --data-root; absolute paths must lie in that folder.
    Writes audit.html and audit.json. Exit 3 where the gate is closed.
    """
    from kerasmed import audit, images, pipelines

    _usage(audit.check_accepted, accepted)
    root, table, class_names, taken = _usage(audit.index, path, root=data_root)
    name = path.resolve().name if path.is_dir() else path.stem
    out = out or Path(f"audit-{name}")
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is better found before the work
    # The store of thumbnails is all that is looked at: files are decoded once, whole, however often this is called.
    store = pipelines.decode(table, root, image_size=images.THUMBNAIL_SIZE, max_quarantined_share=1.0)
    headers = images.headers(root, store.manifest["image_path"].tolist())
    report = audit.examine(
        store.manifest,
        class_names,
        name=name,
        thumbnails=store.thumbnails,
        facts=store.facts,
        headers=headers,
        quarantine=store.quarantine,
        similarity=similarity or None,
        accepted=accepted,
    )
    files = audit.write(report, out)
    click.echo(f"{len(store.manifest)} of {len(table)} files read")
    for kind, row in report.by_kind().iterrows():
        click.echo(f"  {kind:<20} {row['findings']:>6} findings {row['images']:>7} images   {audit.KINDS[kind]}")
    click.echo("\n".join([*report.lines(), taken]))
    closed_by = report.closed_by()
    click.echo(f"written to {' and '.join(str(file) for file in files)}")
    if closed_by:
        click.secho(f"the gate is closed by {', '.join(closed_by)}", fg="red", err=True)
    sys.exit(3 if closed_by else 0)


@main.command()
@click.argument("system")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--run", "run_", default="auto", show_default=True, help="Run folder, or auto: the newest complete one.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="CSV to write.")
@ROOT_OPTIONS["models_root"]
def predict(system, path, run_, out, models_root):
    """Predict an image file, or all in a folder, with the models of a run of SYSTEM.

    With mura, studies are predicted: DICOM files of one study, or images that lie in one folder, are one; so is a file
    that is named alone.

    With lumbar, PATH is a folder of studies (<study>/<series>/<instance>.dcm), one study, or a folder that holds
    train_images, test_images or images with studies; a table *series_descriptions.csv beside or above the studies says
    which modality a series is. The CSV has 25 rows a study, the columns that the RSNA 2024 competition takes, and three
    more: study_path, modalities and error. A study that cannot be answered has empty values, which the competition
    refuses.
    """
    import importlib

    from kerasmed import datasets, environment, runs

    _usage(datasets.reader, system)
    environment.setup(seed=0)
    recipe = importlib.import_module(f"kerasmed.systems.{system}")
    folder = _find_run(system, recipe, run_, models_root)
    if runs.read_json(folder / "environment.json")["data_source"] == "synthetic":
        click.secho(
            f"warning: {folder.name} was trained on synthetic data; its answers mean nothing.", fg="red", err=True
        )
    with runs.whole(out) as temporary:  # a place that cannot be written to is better found before the work
        temporary.touch()
        table = _usage(recipe.predict, folder, path, progress=sys.stderr.isatty())
        table.to_csv(temporary, index=False)
    what, named = ("studies", "study_path") if "study_path" in table else ("images", "image_path")
    answers = table.filter(regex="^p_|^normal_mild$").notna().any(axis=1)
    told = answers.groupby(table[named], sort=False).any()  # a study may have a row a target
    alone = f" ({(table['images'] == 1).sum()} of one image)" if "images" in table else ""
    click.echo(f"{told.sum()} of {len(told)} {what}{alone} predicted with {folder.name}, written to {out}")
    unreadable = table[table["error"] != ""].drop_duplicates(named)
    for name, error in unreadable[[named, "error"]].head(10).itertuples(index=False):
        click.echo(f"  {'not read in full' if told[name] else 'not read'}: {name}: {error}", err=True)
    if len(unreadable) > 10:
        click.echo(f"  and {len(unreadable) - 10} more; see the column `error`", err=True)
    sys.exit(0 if told.any() else 1)


def _find_run(system: str, recipe, run_: str, models_root) -> Path:
    """Find the run to predict with: of the recipe's `NOTEBOOK`; one that is named may be of those in `ALSO` as well."""
    from kerasmed import runs

    for notebook in getattr(recipe, "ALSO", ()) if run_ != "auto" else ():
        with contextlib.suppress(FileNotFoundError):
            return runs.find(system, notebook, run=run_, models_root=models_root)
    return _usage(runs.find, system, recipe.NOTEBOOK, run=run_, models_root=models_root)


@main.command()
@click.option("--run", "run_", default="auto", show_default=True, help="Run folder, or auto: the newest complete one.")
@ROOT_OPTIONS["models_root"]
@click.option("--port", default=8501, show_default=True, type=click.IntRange(1, 65535), help="Of 127.0.0.1.")
@click.option("--no-browser", is_flag=True, help="Do not open the page in a browser.")
def app(run_, models_root, port, no_browser):
    """Show the brain cascade in a browser: images of one person in, path, probabilities and heat maps out.

    Serves 127.0.0.1 alone, sends nothing anywhere and writes no image to the disk. Loads a run of 08_brain_cascade;
    without one the page says how to make it. Ctrl-C ends it. Needs the extra `app`.
    """
    from kerasmed import paths, runs, serving

    models_root = paths.models_root(models_root)
    if run_ != "auto":
        run_ = _usage(runs.find, "brain", serving.NOTEBOOK, run=run_, models_root=models_root).resolve()
    try:
        command = _usage(serving.command, port=port, browser=not no_browser)
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"the app is at http://{serving.ADDRESS}:{port}; Ctrl-C ends it")
    sys.exit(serving.run(command, {"KERASMED_RUN": str(run_), "KERASMED_MODELS": str(models_root)}))


@main.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table as a page.")
def collect(folder, html):
    """Show all runs below FOLDER [$KERASMED_MODELS, else models/] in one table, newest last."""
    from kerasmed import collection

    table = collection.collect(folder)
    if table.empty:
        raise click.UsageError(f"no runs under {folder or 'the models root'}; make one with `kerasmed run NOTEBOOK`.")
    click.echo(collection.as_text(table.drop(columns=["folder", "error"])).to_string(index=False))
    for row in table[table["error"].notna()].itertuples():
        click.echo(f"{row.run}: {row.error}")
    if html:
        collection.write_html(html, table)
        click.echo(f"written to {html}")
