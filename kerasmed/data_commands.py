"""Commands on data: what is where, whether it is sound, what would spoil a result."""

import sys
from pathlib import Path

import click

ROOT_OPTIONS = {
    "data_root": click.option(
        "--data-root", default="", metavar="D", help="Folder of inputs [$KERASMED_DATA, else data/]."
    ),
    "models_root": click.option(
        "--models-root", default="", metavar="M", help="Folder of runs [$KERASMED_MODELS, else models/]."
    ),
}


def usage(function, *args, **kwargs):
    """Call a function whose ValueError or missing file is the user's to mend: exit 2."""
    try:
        return function(*args, **kwargs)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error


@click.group()
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
        made = usage(datasets.fetch, system, paths.data_root(data_root))
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

    module, root = usage(datasets.reader, system), paths.data_root(data_root)
    parts = list(module.CLASS_NAMES)
    if part not in parts and (part or len(parts) > 1):
        raise click.UsageError(f"--part is {part!r}; expected one of {', '.join(parts)}.")
    if module.folder(root) is None:
        raise click.UsageError(f"no {system} data under {root}; expected {module.LAYOUT}.")
    part = part or parts[0]
    if by_study and hasattr(module, "read_studies"):  # whose labels are of the study to begin with
        table = usage(module.read_studies, root)
    else:
        table = usage(module.read, root, part)
        table = usage(studies.table, table, module.CLASS_NAMES[part]) if by_study else table
    runs.write_table(out, table)
    what = "studies" if by_study else "series" if "series_id" in table else "images"
    click.echo(f"{len(table)} {what} of {system}, written to {out}")


@click.command()
@click.argument("system")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def check(system, folder):
    """Check SYSTEM's data in FOLDER (a data root): layout, labels, unreadable files. Exit 1 where anything is wrong."""
    from kerasmed import datasets, paths

    counts, problems = usage(datasets.check, system, paths.data_root(folder))
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


@click.command()
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

    usage(audit.check_accepted, accepted)
    root, table, class_names, taken = usage(audit.index, path, root=data_root)
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
