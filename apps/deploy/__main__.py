"""``python apps/deploy -i STUDY -o OUT -m bundle``: a DICOM study with CT and RTSTRUCT in, RTDOSE out."""

import logging

from dose_app import DosePredictionApp

if __name__ == "__main__":
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    DosePredictionApp().run()
