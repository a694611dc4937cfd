"""The `kerasmed` command: thin over papermill and the package. Imports are inside, so that `--help` is quick."""

import contextlib
import os
import sys
from pathlib import Path

import click

from kerasmed import __version__, data_commands, export_command
from kerasmed.data_commands import ROOT_OPTIONS, usage


def _load_tracking(context, option, track: str | None) -> str | None:
    """Refuse what cannot be tracked before the work."""
    if track:
        from kerasmed import tracking

        try:
            tracking.load()
        except ImportError as error:
            raise click.ClickException(str(error)) from error
    return track


TRACK = click.option(
    "--track",
    type=click.Choice(["mlflow"]),
    callback=_load_tracking,
    help="Also log each run to MLflow: to $MLFLOW_TRACKING_URI, else to mlflow.db beside the runs (extra `track`).",
)


class _Group(click.Group):
    """Ends with a message where a file or a value is wrong, whichever command meets it."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error
        except ImportError as error:  # an extra that is not installed says how to install it
            raise click.ClickException(str(error)) from error


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
        notebook = usage(nb.describe, name)
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
@click.option("--scheduler", default="", metavar="URL", help="Dask cluster that decodes, converts and embeds.")
@TRACK
def run(notebooks, profile, pairs, data_root, models_root, force, timeout, scheduler, track):
    """Run notebooks (or "all") through papermill, each into its run folder.

    A finished run of the same notebook, parameters, data and sources is not repeated; a killed one goes on. A failure
    is reported at the end and does not stop the others; the exit code is then 1.
    """
    from kerasmed import collection, fanout, runs
    from kerasmed import notebooks as nb

    given = _given(pairs, data_root, models_root)
    wanted = nb.names() if notebooks == ("all",) else list(notebooks)
    described = [usage(nb.describe, name) for name in wanted]
    plan = [
        (notebook, usage(nb.resolve, notebook, profile=profile, given=given))
        for notebook in nb.quickest_first(described, profile)
    ]
    if scheduler:
        with fanout.cluster(scheduler):  # one that cannot be used is better found before the work
            os.environ[fanout.SCHEDULER] = scheduler
    done, failed = [], {}
    for number, (notebook, parameters) in enumerate(plan, start=1):
        minutes = notebook.budget_minutes.get(profile)
        budget = f", about {minutes:g} min on 2 cores" if minutes else ""
        click.secho(f"[{number}/{len(plan)}] {notebook.name} ({profile}{budget})", bold=True)
        folder = None
        try:
            placed = nb.place(notebook, parameters)
            folder = placed.folder
            if not nb.execute(placed, force=force, timeout=timeout):
                click.echo(f"finished already on {runs.status(folder)['finished']}; --force repeats it")
            done.append(folder)
        except (RuntimeError, ValueError, OSError) as error:
            failed[notebook.name] = str(error)
            click.secho(f"failed: {str(error).partition(chr(10))[0]}", fg="red", err=True)  # the rest at the end
        _track(track, folder, parameters["models_root"])
    for folder in done:
        _show(collection.collect(folder), folder)
    _end(len(plan), failed)


def _track(track: str | None, folder: Path | None, models_root: str):
    """Log a run, complete or failed, to MLflow where that is asked for; a log that fails spoils no run."""
    from kerasmed import runs

    if track and folder and runs.status(folder)["status"] in ("complete", "failed"):
        from kerasmed import tracking

        try:
            tracking.log(folder, models_root=models_root)
        except (RuntimeError, ValueError, OSError) as error:
            click.secho(f"not tracked: {folder.name}: {error}", fg="yellow", err=True)


def _end(total: int, failed: dict[str, str]):
    """Say of all that failed where and why, and exit with 1 if anything did."""
    if failed:
        for label, error in failed.items():
            click.secho(f"failed: {label}", fg="red", bold=True, err=True)
            click.echo("\n".join(f"  {line}" for line in error.splitlines()), err=True)
        click.secho(f"{len(failed)} of {total} failed: {'; '.join(failed)}", fg="red", err=True)
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
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs at once on this machine.")
@click.option("--scheduler", default="", metavar="URL", help="Dask cluster that does the runs instead.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="CSV of the table [sweep-NB.csv].")
@click.option("--force", is_flag=True, help="Run again what is finished already.")
@click.option("--timeout", type=int, metavar="S", help="Seconds that a cell may take [no limit].")
@TRACK
def sweep(
    notebook, profile, grids, grid_file, pairs, data_root, models_root, jobs, scheduler, out, force, timeout, track
):
    """Run a notebook once for each combination of values, each into its run folder, and end in one table.

    The table is ordered by validation; test figures stand beside it and choose nothing. Every value is checked before
    the first run. A finished run is not repeated; one that failed or was killed goes on at its last whole stage; one
    that fails does not stop the others: the exit code is then 1, and the same command does what is left.

    With --scheduler tcp://HOST:8786 runs go to the workers of a Dask cluster, as many at once as these have threads;
    start it with `dask scheduler`, and on each machine `dask worker tcp://HOST:8786 --nthreads 1` in this folder, on a
    disk that all machines share (extra `cluster`).
    """
    from kerasmed import collection, runs, sweeps
    from kerasmed import notebooks as nb

    if scheduler and jobs > 1:
        raise click.UsageError("--jobs is of this machine, --scheduler of a cluster; leave one of them out.")
    described = usage(nb.describe, notebook)
    common = _given(pairs, data_root, models_root)
    grid = sweeps.with_lists(_grid(grids, grid_file, common), described)
    tried = usage(sweeps.points, grid)
    resolved = [usage(nb.resolve, described, profile=profile, given={**common, **point}) for point in tried]
    labels = sweeps.labels(tried)
    out = _writable(out or Path(f"sweep-{notebook}.csv"))
    placed, failed = sweeps.place(described, resolved)
    click.secho(f"{described.name} ({profile}): {len(tried)} runs", bold=True)
    options = {"jobs": jobs, "scheduler": scheduler, "force": force, "timeout": timeout}
    done, stopped = _watch(placed, labels, failed, track, options)
    table = sweeps.sweep_table(tried, done, failed)
    runs.write_table(out, table)
    click.echo(f"\n{collection.as_text(sweeps.shown_of_sweep(table, list(grid))).to_string(index=False)}")
    ordered = "best validation first" if table["validation"].notna().any() else "none tells a validation value"
    click.echo(f"{len(table)} runs, {ordered}; written to {out}")
    if stopped:
        on_workers = "; what workers have begun goes on there" if scheduler else ""
        click.secho(f"stopped; the same command does the rest{on_workers}", fg="red", err=True)
        sys.exit(130)
    _end(len(tried), {labels[number]: failed[number] for number in sorted(failed)})


def _watch(placed, labels, failed: dict, track: str | None, options: dict) -> tuple[dict, bool]:
    """Execute a sweep's runs in sight of the user, add to `failed`; tables of those done, and if it was stopped."""
    from kerasmed import collection, live, sweeps

    done = {}
    try:
        with live.shown({number: each.folder for number, each in placed.items()}, labels) as ended:
            for number, what, error in sweeps.execute(placed, **options):
                folder = placed[number].folder
                table = collection.collect(folder)  # now: another command may begin it anew later
                if not error and (table["status"] != "complete").all():
                    error = "another command has begun it anew"
                if error:
                    failed[number] = error
                else:
                    done[number] = table
                first = f": {error.splitlines()[0]}" if error else ""
                ended(number, f"[{len(done) + len(failed)}/{len(labels)}] {labels[number]}: {what}{first}")
                _track(track, folder, placed[number].parameters["models_root"])
    except KeyboardInterrupt:
        return done, True
    return done, False


def _writable(path: Path) -> Path:
    """Make the folder of a file to be written; a place where nothing can be written is better found before the work."""
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}; name another place.") from error


def _grid(grids, grid_file: Path | None, common: dict) -> dict:
    """Join --grid-file and --grid, which wins, into one grid; refuse a parameter that is given twice."""
    from kerasmed import sweeps

    listed = [usage(sweeps.parse_grid, text) for text in grids]
    grid = {**(usage(sweeps.read_grid, grid_file) if grid_file else {}), **dict(listed)}
    if not grid:
        raise click.UsageError("nothing to sweep over; give --grid K=V,V or --grid-file.")
    names = [name for name, _ in listed]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"{name} is given in {names.count(name)} --grid; write all its values in one.")
    for name in grid:
        if name == "models_root":
            raise click.UsageError("models_root says where runs go, not what they compute; give it by --models-root.")
        if name in common:
            raise click.UsageError(
                f"{name} is given both as {common[name]!r} (by -p or its own option) and as values to try, "
                f"{grid[name]!r} (by --grid or --grid-file); leave one of them out."
            )
    return grid


def _given(pairs, data_root: str, models_root: str) -> dict:
    """Join -p and the roots into given parameters; roots are those of the caller's folder, wherever a kernel runs."""
    given = dict(usage(_pair, pair) for pair in pairs)
    for name, root in (("data_root", data_root), ("models_root", models_root)):
        root = root or given.get(name)
        if root:
            given[name] = str(Path(str(root)).resolve())
    return given


def _pair(pair: str):
    from kerasmed.notebooks import parse_value

    name, equals, value = pair.partition("=")
    if not equals:
        raise ValueError(f"-p {pair!r} is no assignment; write -p name=value.")
    return name, parse_value(value)


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

    from kerasmed import atomic, datasets, environment, runs

    usage(datasets.reader, system)
    environment.setup(seed=0, devices=[])  # one: batches are small
    recipe = importlib.import_module(f"kerasmed.systems.{system}")
    folder = _find_run(system, recipe, run_, models_root)
    lost = runs.damaged(folder, models=True)
    if lost:
        raise click.ClickException(
            f"{', '.join(lost)} of {folder} is damaged, or was changed after the run; repeat its command with --force."
        )
    if runs.read_json(folder / "environment.json")["data_source"] == "synthetic":
        click.secho(
            f"warning: {folder.name} was trained on synthetic data; its answers mean nothing.", fg="red", err=True
        )
    with atomic.whole(out) as temporary:  # a place that cannot be written to is better found before the work
        temporary.touch()
        table = usage(recipe.predict, folder, path, progress=sys.stderr.isatty())
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
    return usage(runs.find, system, recipe.NOTEBOOK, run=run_, models_root=models_root)


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
        run_ = usage(runs.find, "brain", serving.NOTEBOOK, run=run_, models_root=models_root).resolve()
    command = usage(serving.command, port=port, browser=not no_browser)
    click.echo(f"the app is at http://{serving.ADDRESS}:{port}; Ctrl-C ends it")
    sys.exit(serving.run(command, {"KERASMED_RUN": str(run_), "KERASMED_MODELS": str(models_root)}))


@main.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a report, as one page.")
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report's figures as CSV.")
@click.option("--metric", metavar="M", help="Report this metric alone, such as auroc [all headlines].")
def collect(folder, html, csv, metric):
    """Show all runs below FOLDER [$KERASMED_MODELS, else models/] in one table, newest last.

    The report ranks the runs that answer one question, with intervals and paired differences to the best of them and
    to their baselines, and flags what is not to be trusted: synthetic data, weights newer than their metrics, closed
    gates.
    """
    from kerasmed import collection, report

    table = collection.collect(folder)
    if table.empty:
        raise click.UsageError(f"no runs under {folder or 'the models root'}; make one with `kerasmed run NOTEBOOK`.")
    ranked = usage(report.rank, table, metric=metric)
    for path in filter(None, (csv, html)):
        _writable(path)
    click.echo(collection.as_text(table[list(collection.SHOWN)]).to_string(index=False))
    for row in table[table["error"].notna()].drop_duplicates("folder").itertuples():
        click.echo(f"{row.run}: {row.error}")
    if csv:
        report.write_csv(csv, ranked)
    if html:
        report.write_html(html, table, ranked)
    for path in filter(None, (csv, html)):
        click.echo(f"written to {path}")


for command in (data_commands.data, data_commands.check, data_commands.audit, export_command.export):
    main.add_command(command)
