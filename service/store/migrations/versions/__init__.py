"""One file a revision; `down_revision` chains them."""
