"""De-identification of DICOM images by PS3.15 Annex E, Basic Profile, with the site's options."""
