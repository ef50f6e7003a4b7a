"""The pages: templates, style and icon. They ship in the package and load nothing else."""
