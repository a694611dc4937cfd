"""`kerasmed export`: a run's networks leave the notebook."""

import importlib
from pathlib import Path

import click

from kerasmed.data_commands import ROOT_OPTIONS, usage


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "format_",
    required=True,
    type=click.Choice(["onnx", "saved_model", "litert"]),
    help="ONNX for onnxruntime and most others, SavedModel for TensorFlow, LiteRT for phones.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder [RUN/export/FORMAT].")
@ROOT_OPTIONS["data_root"]
@ROOT_OPTIONS["models_root"]
@click.option("--unchecked", is_flag=True, help="Compare on noise, where the run's images are not at hand.")
def export(run, format_, out, data_root, models_root, unchecked):
    """Write the networks of RUN, a complete run's folder or its name, for use without Keras.

    Each network is asked some images of the run's test split, before and after: where probabilities differ by more
    than 0.0001, or features by more than that share of the largest, nothing is written. Beside the networks lie
    parity.json with what was found, preprocessing.json with how images are read, and model_card.md: data, training,
    figures, limits, and code that runs. A network that is not the one that the run's figures were measured with is
    refused. onnx and litert need the extra `export`.
    """
    from kerasmed import environment, paths, runs
    from kerasmed import export as exports

    exports.check_format(format_)
    folder = usage(_find, run, paths.models_root(models_root))
    system = runs.status(folder)["system"]
    environment.setup(seed=0, devices=["CPU:0"])  # a GPU multiplies float32 with fewer digits
    recipe = importlib.import_module(f"kerasmed.systems.{system}")
    networks = usage(_networks, recipe, folder)
    exports.check_weights(folder, networks)
    given, sampled, truth = None, "", {}
    if not unchecked:
        source, truth, note = usage(_locate, system, folder, data_root)
        given, sampled = usage(_samples, recipe, folder, source.root, networks)
        sampled += note
    out = out or folder / "export" / format_
    records = exports.write(folder, format_, networks, given, out, sampled=sampled, truth=truth)
    for each in records:
        click.echo(
            f"{each['network']}: largest difference {each['max_difference']:.2g} on {each['rows']} rows "
            f"({each['pixels']}), {each['runtime']}"
        )
    if unchecked:
        click.secho("not compared on images of the run; the card says so", fg="yellow", err=True)
    click.echo(f"written to {out}")


def _find(run: str, home: Path) -> Path:
    """Find a complete run by its path, or by its name below any system."""
    from kerasmed import runs

    for candidate in (Path(run), *sorted(home.glob(f"*/{Path(run).name}"))):
        state = runs.status(candidate)
        if "system" in state:
            return runs.find(state["system"], run=candidate, models_root=home)
    raise FileNotFoundError(f"no run folder at {run}, nor one of that name under {home}; see `kerasmed collect`.")


def _networks(recipe, folder: Path) -> list:
    """Describe a run's networks; a run that leaves none for new images is refused."""
    try:
        return recipe.exported_networks(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder.name} holds no network that answers for new data ({Path(error.filename or '').name or error}); "
            f"export a run that `kerasmed predict` can use."
        ) from error


def _samples(recipe, folder: Path, root: Path, networks: list) -> tuple[dict, str]:
    """Read what a run's networks are compared on: images alone, where the recipe does not say otherwise."""
    from kerasmed import export as exports

    if hasattr(recipe, "exported_samples"):
        return recipe.exported_samples(folder, root)
    return exports.samples_of_images(folder, root, networks)


def _locate(system: str, folder: Path, data_root: str):
    """Find the data of a run, for its test split; synthetic ones are written again as its notebook did.

    Returns:
        Source; what is known of a synthetic set; and "", or that the files found are not those of the run, whereupon
        nothing is known of them.
    """
    from kerasmed import datasets, paths, runs

    parameters = runs.read_json(folder / "params.json")
    environment = runs.read_json(folder / "environment.json")
    kind = environment["data_source"]
    # As for the notebook, $KERASMED_DATA counts unless the parameters ask for synthetic data.
    chosen = data_root or parameters["data_source"] != "synthetic" and paths.is_data_root_chosen()
    try:
        wanted = {**parameters, "data_source": "auto" if chosen else kind}
        source = datasets.locate(system, wanted, data_root=data_root)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"the images of {folder.name} are not at hand, so that its export cannot be compared on them: {error} Name "
            "their folder with --data-root; or, knowing that it is not compared, add --unchecked."
        ) from error
    if source.kind != kind:
        raise ValueError(f"{folder.name} was trained on {kind} data, and those under {source.root} are {source.kind}.")
    found = datasets.fingerprint(system, source)
    if found == environment["fingerprint"]:
        return source, datasets.truth(system, source), ""
    # Not refused: a copy that was made without its times has another fingerprint as well.
    return source, {}, f", of files that differ from the run's in name, size or time (fingerprint {found})"
