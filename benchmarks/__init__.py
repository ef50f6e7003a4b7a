"""The measurements behind the figures that this project states; one command each."""
