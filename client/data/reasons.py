"""Why a case is left out, for a hospital's physicist: what is wrong, and what to do.

Only the keys and counts may ever leave the hospital. No sentence tells anybody to delete a file:
leaving a case out of one study changes nothing on disk.
"""

from __future__ import annotations

KEPT = "It is left out of this study only; the file itself stays unchanged."

REASONS: dict[str, str] = {
    "unreadable": "The file cannot be read: it is damaged, incomplete or of another format than "
    "its name says. Export it again from the source.",
    "file_missing": "The table names a file that is not there. Check the name in the table, or "
    "copy the file to the folder.",
    "path_outside": "The file lies outside the folder named in site.toml, or its name is not a "
    "plain one. Set `path` to a folder that holds all files, without links out of it.",
    "not_a_plain_file": "This is a link or a device, not a file. Put the file itself there.",
    "too_large": "The file declares more data than any clinical image has. It is probably "
    "damaged; export it again.",
    "implausible_spacing": "At the study's spacing the image would have more voxels than any "
    "clinical image: the spacing in its header is probably wrong, or in other units than "
    "millimetres. Convert it again from DICOM.",
    "memory": "This computer's memory did not suffice to read the case. Close other programs, or "
    "prepare the data on a computer with more memory.",
    "reading_failed": "The file has something that medfl's readers did not expect; the log has "
    "the details. Export it again from the source, and please report it if that does not help.",
    "bad_affine": "The header does not say where the volume lies in the body. Convert it again "
    "from DICOM.",
    "no_affine": "The NIfTI header does not say where the volume lies (qform_code and sform_code "
    "are 0), so that left and right cannot be told. Convert it again from DICOM, or declare "
    "`orientation` in site.toml if all such files are known to have one.",
    "sheared": "The slices are shifted against each other (gantry tilt), so that the volume is no "
    "box. Convert it with a program that corrects the tilt, such as dcm2niix.",
    "dimensions": "The image has another number of dimensions than the study expects (one slice "
    "instead of a volume, or the reverse). Check that the right images are in the folder.",
    "channels": "The image has another number of channels than the study expects. Check that all "
    "sequences of the case are there.",
    "no_spacing": "The study resamples to millimetres, but the file has no pixel spacing. Take "
    "the original DICOM, which has it.",
    "nan_values": "The image holds values that are not numbers (NaN or infinite). Convert it "
    "again from the source.",
    "empty_image": "Every pixel of the image has the same value, so there is nothing to see. "
    "Export it again.",
    "no_image": "There is no image for this line of the table. Copy the image to the folder, or "
    "leave it so: the line is then not used.",
    "ambiguous_line": "Several lines of the table belong to this case and disagree, or a line's "
    "name means two cases. Add a column that tells them apart and map it in `columns` of "
    "site.toml: for images `series`, `study` or `instance` (a DICOM UID), `accession` or `image` "
    "(a file or folder); for records `visit`.",
    "name_differs": "The table writes this case's name otherwise than the images: leading zeros, "
    "capitals, blanks or the form of accented letters (as spreadsheets, macOS and old Windows "
    "shares change them). Write it in the table as the images have it; a spreadsheet needs the "
    "column formatted as text.",
    "label_missing": "The label is empty. Fill it in in the table, if it is known.",
    "label_unknown": "The label is none of the study's classes. Correct the table, or ask the "
    "coordinator to add this spelling to `label_map` of the study, or write what this hospital's "
    "word means into `values.label` of site.toml.",
    "mask_missing": "The image has no mask. Add the mask to the folder, if there is one.",
    "several_masks": "Several segmentations belong to one image, and nothing says which one the "
    "study means. Name it in the table's mask column.",
    "mask_shared": "One mask would serve several images, and nothing says on which it was drawn. "
    "Name each image's own mask in the table's mask column, or by the image's own name.",
    "mask_geometry": "The mask does not lie on the image's grid (other size, place or voxel "
    "size). Export the mask in the image's own geometry.",
    "mask_frame": "Mask and image have different frames of reference, so that their places cannot "
    "be compared. Export the mask for this very image, or register it first.",
    "contours": "The contours of a structure (RTSTRUCT) cannot be turned into voxels: they are "
    "open, cross each other, lie between slices or are on some slices only. Export them as closed "
    "contours on every slice, or as DICOM SEG.",
    "mask_alone": "A segmentation (DICOM SEG) or a set of contours (RTSTRUCT) names no image that "
    "is here, so that it cannot be matched. Copy its images to the folder, or export it again with "
    "references to them.",
    "segment_unknown": "A structure of the mask has a label and a code that are none of the "
    "study's classes; its number says nothing. Add label or code (such as `SCT:10200004`) to "
    '`label_map`; a line `"*" = "background"` says that all other structures are background.',
    "segment_ambiguous": "Label and code of a structure stand for two classes of the study. "
    "Correct the mask, or the lines of `label_map`.",
    "mask_values": "The mask holds values or colours that are none of the study's classes. Ask the "
    "coordinator to add them to `label_map` of the study (a colour as `#ff0000`), or export the "
    "mask again.",
    "transparency": "Some pixels of the picture are transparent, so that what lies there cannot be "
    "known. Export it without transparency.",
    "mask_overlap": "Two structures of the segmentation overlap, but the study allows one class a "
    "voxel. Export them without overlap.",
    "feature_absent": "The table has no column for a field of the study. Name this hospital's "
    "column in `columns` of site.toml.",
    "feature_not_a_number": "A field that must be a number holds other text. Correct the table, "
    "or add the text to `missing` of site.toml if it means that the value is unknown; where a "
    "comma or point may be the decimal mark, say which as `decimal`.",
    "feature_level": "A field holds a value that is not among the study's levels. Correct the "
    "table, ask the coordinator to add the level, or write what this hospital's word means into "
    "`values` of site.toml.",
    "incomplete_record": "A field of the record is missing, and this study uses complete records "
    "only. Nothing is wrong with the record.",
    "implausible": "A number lies beyond the range that the study gives for it: another unit, or a "
    "number that stands for a missing value. Correct the table, or add the number to `missing` of "
    "site.toml if it means that the value is unknown.",
    "duplicate": "The same image is there twice; one copy is used. If there are many, find out how "
    "they came there: copies of one patient under two names would spoil the test.",
    "duplicate_id": "Two lines or files carry the same case name and agree. The first is used. "
    "Give each its own name if they are different cases.",
    "split_unknown": "The split column holds neither train, validation nor test. Correct it.",
    "not_in_table": "The image is not listed in the table, so the study does not use it. Add a "
    "line if it should be used.",
    "withdrawn": "The patient has withdrawn consent (`medfl-client exclude`). It is right that the "
    "case is not used.",
    "not_dicom": "The file is not DICOM. If it should be, export it again from the archive.",
    "other_file": "The file is of another kind (a viewer, a preview), as its name says. It is "
    "not used; nothing needs to be done.",
    "not_an_image": "The DICOM object holds no image (a report, a presentation state, an index). "
    "It is not used; nothing needs to be done.",
    "dicom_truncated": "The DICOM file ends too early: the transfer broke off. Send it again from "
    "the archive.",
    "dicom_pixels": "The pixel data do not fit what the header declares. Export the image again "
    "from the archive.",
    "dicom_rescale": "The header's rescale slope or lookup table cannot be used (a slope of zero, "
    "text instead of a number, a table shorter than it says). Export the image again from the "
    "archive.",
    "dicom_deflated": "The compressed file expands to far more than its size allows. Export it "
    "uncompressed.",
    "dicom_nesting": "The header nests deeper than any scanner writes. Export it again.",
    "dicom_preamble": "The file begins like a program, not like an image. Have IT security look "
    "at it, and export the image again.",
    "dicom_worker": "Reading the file took too much memory or time and was stopped. Export it "
    "uncompressed from the archive.",
    "dicom_codec": "The image is compressed in a way that cannot be decoded here. Export it "
    "uncompressed (Explicit VR Little Endian).",
    "uid_conflict": "Two different files carry the same SOP Instance UID. Find out which is the "
    "right one; the archive should hold only one.",
    "burned_in": "The image says that text, perhaps the patient's name, is part of the picture.",
    "burned_in_unknown": "Images of this kind (ultrasound, angiography, screen copies) often show "
    "the patient's name, and this one does not say that it is free of it (Burned In Annotation "
    '= NO). Have it checked and tagged "NO" if it is clean.',
    "no_orientation": "The slices do not say where they lie in the body. Export the original "
    "series instead of a derived one.",
    "mixed_geometry": "The slices of the series, or the channels' files, differ in size, spacing, "
    "place or direction (a localizer, several series in one, sequences that were not registered). "
    "Choose the series that the study means, or bring all channels onto one grid.",
    "slice_gap": "The slices are not evenly spaced: probably one is missing. Send the whole "
    "series again from the archive.",
    "several_volumes": "The series holds several volumes of the same place (over time, echoes or "
    "reconstructions). Export the one that the study means as a series of its own.",
    "several_acquisitions": "Slices of several acquisitions lie between each other in one series. "
    "Export the one that the study means as a series of its own.",
    "mosaic": "The slices are stored side by side in one picture (mosaic). Export the series as "
    "single slices or as enhanced DICOM.",
}

# Left out without anything being wrong, so that they do not count as faulty data.
NOT_FAULTY = frozenset(
    {"incomplete_record", "not_in_table", "not_an_image", "other_file", "mask_alone", "withdrawn"}
)


def sentence(reason: str) -> str:
    """The reason in words, and that nothing happens to the file."""
    return f"{REASONS[reason]} {KEPT}"
