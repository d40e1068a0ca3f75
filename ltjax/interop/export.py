"""Export the weights of a run, or of a folder of weights.

    python -m ltjax.interop.export WORKDIR_OR_WEIGHTS --format=safetensors --out=net.safetensors
    python -m ltjax.interop.export WORKDIR_OR_WEIGHTS --format=stablehlo --image_size=32 --out=net.stablehlo
    python -m ltjax.interop.export WORKDIR_OR_WEIGHTS --format=onnx --image_size=32 --out=net.onnx

`state_dict` (a file of `torch.save`; needs PyTorch) and `safetensors` have PyTorch's names, see
`ltjax.interop.torch.export_state_dict`. `weights` is a folder for `config.weights`. `stablehlo` is the whole network in
one file, for cpu, cuda and tpu and batches of any size; it needs jax, but not ltjax:

    import jax.export, pathlib
    file = bytearray(pathlib.Path("net.stablehlo").read_bytes())
    network = jax.export.deserialize(file).call
    logits = network(images)  # float32 [b, H, W, channels] in [0, 1] -> [b, num_classes]
    print(logits.argmax(-1))

`onnx` is the same for ONNX Runtime; writing it needs jax2onnx. Its metadata has the class names of a run:

    import json, onnxruntime
    session = onnxruntime.InferenceSession("net.onnx")
    (logits,) = session.run(None, {"images": images})  # float32 [b, H, W, channels] in [0, 1] -> [b, num_classes]
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

With `--pixels=uint8`, both take uint8 from 0 to 255 instead. Both normalise the images themselves, and have no softmax,
fitted temperature or prior.

The network of a run is that of the newest checkpoint of its last stage, as it is evaluated. Outputs of a `stablehlo` or
`onnx` are in the order of our classes; the other formats keep a folder's order.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ltjax import models
from ltjax.data.augment import as_float
from ltjax.interop.torch import export_state_dict
from ltjax.runs.trained import class_names, newest, weights_of
from ltjax.runs.weights import (
    DESCRIPTION,
    Weights,
    check_classifier,
    described,
    in_our_order,
    load_weights,
    save_safetensors,
    save_weights,
)
from ltjax.system.command_line import Parser, exit_code
from ltjax.system.devices import start_devices
from ltjax.system.files import replacing
from ltjax.system.paths import local
from ltjax.system.wording import one_line
from ltjax.types import UserError

FORMATS = ("state_dict", "safetensors", "weights", "stablehlo", "onnx")
WHOLE = ("stablehlo", "onnx")  # formats of the whole network, for images of one size
PIXELS = {"float": jnp.float32, "uint8": jnp.uint8}
OPSET = 18  # of ONNX
PLATFORMS = ("cpu", "cuda", "tpu")


def read(source: str | Path, *, net: str = "net", replica: int = 0) -> Weights:
    """Read a folder of weights, or the newest weights of a run. Needs no data set.

    Args:
      source: Folder or workdir.
      net: "net", or "guide" if the run trains one.
      replica: Which one, if the run has several.
    """
    source = local(source)
    if (source / DESCRIPTION).is_file():
        return load_weights(source)
    return weights_of(source, newest(source), net=net, replica=replica)


def _network(weights: Weights, kind: str, **settings: Any) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """Return images [b, H, W, channels] -> logits in our order, and the number of channels.

    Args:
      weights: Of the network. UserError if they have no classifier.
      kind: The format, for messages.
      **settings: Of the network, that replace its own.
    """
    check_classifier(weights, f"--format={kind}")
    weights = in_our_order(weights)
    changed: dict[str, Any] = {**weights.settings, "platform": "gpu", **settings}  # its convolution works everywhere
    model = models.create(changed.pop("name"), weights.num_classes, **changed)
    params, stats = weights.variables.params["net"], weights.variables.stats["net"]

    def network(images: jax.Array) -> jax.Array:
        outputs: Any = model.apply({"params": params, "batch_stats": stats}, as_float(images), False)
        return outputs.logits

    return network, models.input_channels(params)


def stablehlo(weights: Weights, image_size: tuple[int, int], *, pixels: str = "float") -> bytes:
    """Export a network with its weights as one `jax.export` artifact.

    It maps images [b, H, W, channels] to logits [b, num_classes], in the order of our classes, for any b, on cpu, cuda
    and tpu, in this version of JAX or a newer one.

    Args:
      weights: To export.
      image_size: H and W.
      pixels: Of the images: "float", float32 in [0, 1]; or "uint8".

    Raises:
      UserError: The package flatbuffers is missing, or the weights have no classifier.

    Examples:
      >>> from jax.export import deserialize
      >>> settings = dict(name="resnet_cifar", depth=8, width=2)
      >>> net = jax.jit(models.create(num_classes=3, **settings).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> weights = Weights(Variables({"net": net["params"]}, {"net": net["batch_stats"]}, {}), settings, 3)
      >>> file = export.stablehlo(weights, (8, 8))
      >>> deserialize(bytearray(file)).call(jnp.zeros((2, 8, 8, 3))).shape
      (2, 3)
    """
    from jax import export

    network, channels = _network(weights, "stablehlo")
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_size, channels), PIXELS[pixels])
    exported = export.export(jax.jit(network), platforms=PLATFORMS)(images)
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError("--format=stablehlo needs flatbuffers: pip install flatbuffers") from error


def onnx(
    weights: Weights, image_size: tuple[int, int], *, pixels: str = "float", class_names: Sequence[str] = ()
) -> bytes:
    """Export a network with its weights as an ONNX model.

    It maps "images" [b, H, W, channels] to "logits" float32 [b, num_classes], in the order of our classes, for any b. A
    bfloat16 network computes in float32. The metadata has "class_names", a JSON list, if they are known, and "ltjax",
    JSON of the network's settings and the type of its pixels.

    Args:
      weights: To export.
      image_size: H and W.
      pixels: Of the images: "float", float32 in [0, 1]; or "uint8".
      class_names: In our order; () if unknown.

    Raises:
      UserError: The package jax2onnx is missing or cannot convert the network, or the weights have no classifier.
    """
    try:
        from jax2onnx import to_onnx  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError('--format=onnx needs jax2onnx: pip install "ltjax[onnx]"') from error
    network, channels = _network(weights, "onnx", platform="onnx", dtype="float32", remat=False)
    images = jax.ShapeDtypeStruct(("b", *image_size, channels), PIXELS[pixels])
    names = dict(model_name="ltjax", input_names=["images"], output_names=["logits"])
    logger = logging.getLogger("onnx_ir.serde")  # warns of each intermediate shape without a type
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model = to_onnx(network, [images], opset=OPSET, **names)
    except Exception as error:  # an operation that it does not know raises anything
        about = described(weights.settings, weights.num_classes)
        raise UserError(
            f"jax2onnx cannot convert {about} for this size ({one_line(error)}): take --format=stablehlo"
        ) from error
    finally:
        logger.setLevel(level)
    about = {"ltjax": json.dumps({"model": weights.settings, "pixels": pixels})}
    if class_names:
        about["class_names"] = json.dumps(list(class_names))
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def write(
    weights: Weights,
    kind: str,
    out: Path,
    image_size: tuple[int, int] | None = None,
    *,
    pixels: str = "float",
    class_names: Sequence[str] = (),
) -> None:
    """Write weights to `out` in a format of `FORMATS`.

    Args:
      weights: To write.
      kind: The format.
      out: A file; for "weights", a folder.
      image_size: H and W, for "stablehlo" and "onnx".
      pixels: Of the images, for "stablehlo" and "onnx": "float" in [0, 1], or "uint8".
      class_names: For "onnx"; () if unknown.
    """
    if kind == "weights":
        shape = dict(num_classes=weights.num_classes, class_order=weights.class_order)
        save_weights(out, weights.variables, weights.settings, **shape, images=weights.images, licence=weights.licence)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind in WHOLE:
        if image_size is None:
            raise UserError(f"--format={kind} needs --image_size=SIDE or HEIGHTxWIDTH of the images, such as 32")
        if kind == "stablehlo":
            whole = stablehlo(weights, image_size, pixels=pixels)
        else:
            whole = onnx(weights, image_size, pixels=pixels, class_names=class_names)
        with replacing(out) as file:
            file.write_bytes(whole)
        return
    settings = dict(weights.settings)
    model = models.create(settings.pop("name"), weights.num_classes, **settings)
    state_dict = export_state_dict(weights.variables, model)
    if kind == "safetensors":
        metadata = {"model": weights.settings, "class_order": weights.class_order}
        with replacing(out) as file:
            save_safetensors(state_dict, file, {"format": "pt", "ltjax": json.dumps(metadata)})
        return
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError("--format=state_dict needs PyTorch: install torch, or take --format=safetensors") from error
    with replacing(out) as part, open(part, "wb") as file:
        torch.save({key: torch.from_numpy(value) for key, value in state_dict.items()}, file)


def _image_size(text: str) -> tuple[int, int] | None:
    sides = text.lower().split("x") if text else []
    if not sides:
        return None
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise UserError(f"--image_size={text}: SIDE or HEIGHTxWIDTH in pixels, such as 32 or 224x224")
    return int(sides[0]), int(sides[-1])


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit code: 0, or 2 after one line `error: ...` on stderr."""
    parser = Parser(
        prog="python -m ltjax.interop.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="WORKDIR_OR_WEIGHTS")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", required=True, help="file to write; for weights, a folder")
    parser.add_argument("--image_size", default="", help=f"SIDE or HEIGHTxWIDTH, for {' and '.join(WHOLE)}")
    parser.add_argument(
        "--pixels", choices=PIXELS, default="float", help="float in [0, 1] (default), or uint8; also for these"
    )
    parser.add_argument("--net", default="net", help="net (default) or guide")
    parser.add_argument("--replica", type=int, default=0, help="which, if the run has several; default: 0")

    def export() -> None:
        args = parser.parse_args(argv)
        start_devices()
        image_size = _image_size(args.image_size)
        weights = read(args.source, net=args.net, replica=args.replica)
        names = class_names(local(args.source), weights.num_classes) if args.format == "onnx" else ()
        write(weights, args.format, local(args.out), image_size, pixels=args.pixels, class_names=names)
        print(f"{args.out}: {described(weights.settings, weights.num_classes)}, as {args.format}")

    return exit_code(export)


if __name__ == "__main__":
    sys.exit(main())
