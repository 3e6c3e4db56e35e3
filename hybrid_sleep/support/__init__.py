"""What every part of the package uses: files, provenance, versions, the terminal."""
