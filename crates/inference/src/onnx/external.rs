//! Tensor data in files beside the model.
//!
//! Responsible for: answering the reads that a model's `external_data` entries ask for, and for nothing else being
//! read: the location comes from the model, and a model can come from anyone.
//!
//! Invariants:
//! - only regular files inside the model's folder are read, also through symbolic links and `..`;
//! - no more is allocated than the file has bytes.
//!
//! A file that is replaced by a link between the check and the opening is the folder's owner's doing.

use super::source::reserve;
use crate::error::ModelError;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

/// Where the data of tensors with `data_location = EXTERNAL` comes from.
pub trait ExternalData {
    /// `length` bytes from `offset` of the file `location`, or all that follow `offset` without `length`.
    ///
    /// # Errors
    /// `ExternalDataMissing` when there is nothing to read, `ExternalDataOutside` when reading it is not allowed.
    fn read(&mut self, location: &str, offset: u64, length: Option<u64>) -> Result<Vec<u8>, ModelError>;
}

/// No external data: for models that come as bytes.
pub struct NoExternalData;

impl ExternalData for NoExternalData {
    fn read(&mut self, location: &str, _: u64, _: Option<u64>) -> Result<Vec<u8>, ModelError> {
        Err(ModelError::external_data_missing("the model keeps tensor data in another file")
            .detail(format!("It refers to the file {location:?}."))
            .hint("Use load_model_from_file, which reads files beside the model, or save the model as one file."))
    }
}

/// Files of one folder.
pub struct FolderExternalData {
    folder: PathBuf,
}

impl FolderExternalData {
    /// The folder in which the model lies.
    ///
    /// # Errors
    /// `ExternalDataMissing` when it cannot be resolved.
    pub fn new(folder: impl AsRef<Path>) -> Result<FolderExternalData, ModelError> {
        let folder = folder.as_ref();
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        match folder.canonicalize() {
            Ok(folder) => Ok(FolderExternalData { folder }),
            Err(error) => Err(ModelError::external_data_missing("the folder of the model cannot be read")
                .detail(format!("{}: {error}.", folder.display()))),
        }
    }

    /// The file at `location`, opened, and its size.
    fn open(&self, location: &str) -> Result<(File, u64), ModelError> {
        let outside = || {
            ModelError::external_data_outside("the model refers to tensor data outside its folder")
                .detail(format!("The location is {location:?}."))
                .hint("Save the model with its external data in the same folder, or as one file.")
        };
        let missing = |why: String| {
            ModelError::external_data_missing("tensor data of the model is missing")
                .detail(format!("The file {location:?} {why}."))
                .hint("Put the external data beside the model, or save the model as one file.")
        };
        let relative = Path::new(location);
        let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if location.contains('\0') || !relative.components().all(inside) {
            return Err(outside());
        }
        if !relative.components().any(|part| matches!(part, Component::Normal(_))) {
            return Err(missing("is no file name".into()));
        }
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound => missing("does not exist".into()),
            _ => missing(format!("cannot be read: {error}")),
        };
        let path = self.folder.join(relative).canonicalize().map_err(failed)?;
        if !path.starts_with(&self.folder) {
            return Err(outside());
        }
        // Asked before opening, since opening a pipe would wait for its writer.
        if !path.metadata().map_err(failed)?.is_file() {
            return Err(missing("is not a regular file".into()));
        }
        let file = File::open(&path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        Ok((file, len))
    }
}

impl ExternalData for FolderExternalData {
    fn read(&mut self, location: &str, offset: u64, length: Option<u64>) -> Result<Vec<u8>, ModelError> {
        let (mut file, size) = self.open(location)?;
        let left = size.checked_sub(offset);
        let length = left.and_then(|left| Some(length.unwrap_or(left)).filter(|&length| length <= left));
        let short = || {
            ModelError::external_data_missing("tensor data of the model is missing")
                .detail(format!("The file {location:?} has {size} bytes; the model reads beyond its end."))
                .hint("The file may be cut off, or belong to another model: copy it again.")
        };
        let length = length.and_then(|length| usize::try_from(length).ok()).ok_or_else(short)?;
        let mut data = Vec::new();
        reserve(&mut data, length)?;
        data.resize(length, 0);
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut data));
        match read {
            Ok(()) => Ok(data),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(short()),
            Err(error) => Err(ModelError::external_data_missing("tensor data of the model cannot be read")
                .detail(format!("{location:?}: {error}."))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind::{ExternalDataMissing, ExternalDataOutside};
    use std::os::unix::fs::symlink;

    /// A folder of its own for one test, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("tessera_external_{name}_{}", std::process::id()));
            std::fs::create_dir_all(path.join("model/sub")).unwrap();
            std::fs::write(path.join("outside"), b"secret").unwrap();
            std::fs::write(path.join("model/data.bin"), b"0123456789").unwrap();
            std::fs::write(path.join("model/sub/deep"), b"deep").unwrap();
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn reads_ranges_inside_the_folder() {
        let scratch = Scratch::new("ranges");
        let mut data = FolderExternalData::new(scratch.0.join("model")).unwrap();
        assert_eq!(data.read("data.bin", 0, None).unwrap(), b"0123456789");
        assert_eq!(data.read("./data.bin", 8, None).unwrap(), b"89");
        assert_eq!(data.read("data.bin", 2, Some(3)).unwrap(), b"234");
        assert_eq!(data.read("data.bin", 10, Some(0)).unwrap(), b"");
        assert_eq!(data.read("sub/deep", 0, Some(4)).unwrap(), b"deep");
        symlink("data.bin", scratch.0.join("model/link")).unwrap();
        assert_eq!(data.read("link", 9, None).unwrap(), b"9");
        for (offset, length) in [(0, Some(11)), (11, None), (u64::MAX, Some(1)), (1, Some(u64::MAX))] {
            assert_eq!(data.read("data.bin", offset, length).unwrap_err().kind, ExternalDataMissing);
        }
        for location in ["absent", "", ".", "sub", "data.bin/x", "pipe\\..\\x"] {
            assert_eq!(data.read(location, 0, None).unwrap_err().kind, ExternalDataMissing, "{location}");
        }
    }

    #[test]
    fn reads_nothing_outside_the_folder() {
        let scratch = Scratch::new("outside");
        let mut data = FolderExternalData::new(scratch.0.join("model")).unwrap();
        symlink("../outside", scratch.0.join("model/link")).unwrap();
        symlink(&scratch.0, scratch.0.join("model/folder")).unwrap();
        let absolute = scratch.0.join("outside").display().to_string();
        let inside = scratch.0.join("model/data.bin").display().to_string();
        for location in
            ["../outside", "sub/../../outside", "sub/..", "link", "folder/outside", "a\0b", &absolute, &inside]
        {
            let error = data.read(location, 0, None).unwrap_err();
            assert_eq!(error.kind, ExternalDataOutside, "{location}");
            assert!(error.hint.is_some());
        }
        assert_eq!(FolderExternalData::new(scratch.0.join("none")).err().unwrap().kind, ExternalDataMissing);
        assert_eq!(NoExternalData.read("data.bin", 0, None).unwrap_err().kind, ExternalDataMissing);
    }
}
