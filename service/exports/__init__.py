"""Deploy forms for other engines: ONNX and OpenVINO's IR, checked before they are handed out.

files       which formats there are, what each needs, and the file made in a confined child
convert     inside the child: the program converted, run by the other engine, and compared
stored      made once for each version: the file as an artifact in the store
"""

from service.exports.files import FORMATS, export_own_file, is_installed
from service.exports.stored import exported_artifact

__all__ = ["FORMATS", "export_own_file", "exported_artifact", "is_installed"]
