"""The console script `strobe`, outside of the package: `strobe doctor` has to run where `import strobe` fails."""

import importlib.util
import sys


def main() -> int:
    if sys.argv[1:2] != ["doctor"]:
        from strobe.cli import main

        return main()
    folder = importlib.util.find_spec("strobe").submodule_search_locations[0]  # finding it does not import it
    spec = importlib.util.spec_from_file_location("strobe_doctor", f"{folder}/doctor.py")
    doctor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doctor)
    return doctor.main(sys.argv[2:])
