"""The benchmark of prediction at a small size."""

import json

from benchmarks import predict


def test_json_has_the_rates_and_cpu_times_of_decoding_and_prediction(tmp_path):
    out = tmp_path / "numbers.json"
    predict.main(["--images=6", "--turns=1", "--width=40", "--height=30", "--size=8", "--batch_size=4", f"--out={out}"])
    numbers = json.loads(out.read_text())
    for key in ("images_per_second", "cpu_microseconds_per_image"):
        assert numbers[key].keys() == {"decoding", "prediction", "network alone", "rows alone"}
        assert min(numbers[key].values()) > 0
