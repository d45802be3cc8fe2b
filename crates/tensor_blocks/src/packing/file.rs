//! Packing problems in files: see `data/README.md` for the form.

use super::PackingProblem;
use serde::Deserialize;

/// A file's content, as its JSON says it.
#[derive(Clone, Debug, Deserialize)]
pub struct PackingFile {
    /// The problem's name.
    pub workload: String,
    /// Blocks on a page.
    pub blocks_per_tensor_page: usize,
    tensors: Vec<FileTensor>,
}

#[derive(Clone, Debug, Deserialize)]
struct FileTensor {
    name: String,
    blocks: Vec<[u32; 2]>,
}

/// Why a file's content is no problem.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackingFileError {
    /// A page of no blocks.
    #[error("blocks_per_tensor_page must be at least 1")]
    NoPageSize,
    /// A range that ends before it starts.
    #[error("tensor \"{tensor}\" has the range [{first}, {last}], which ends before it starts")]
    Reversed {
        /// The tensor's name.
        tensor: String,
        /// The range's start.
        first: u32,
        /// The range's end.
        last: u32,
    },
    /// More references than memory is given for.
    #[error("the tensors have more than {max} blocks in total", max = PackingFile::MAX_REFERENCES)]
    TooLarge,
}

impl PackingFile {
    /// References of tensors to blocks that a file may have in total: ranges are short to write and long to hold.
    pub const MAX_REFERENCES: u64 = 1 << 24;

    /// The problem that the file describes.
    ///
    /// # Errors
    /// When a page has no blocks, a range is reversed, or there are more than [`PackingFile::MAX_REFERENCES`].
    pub fn problem(&self) -> Result<PackingProblem, PackingFileError> {
        if self.blocks_per_tensor_page == 0 {
            return Err(PackingFileError::NoPageSize);
        }
        let mut references = 0;
        for tensor in &self.tensors {
            for &[first, last] in &tensor.blocks {
                if last < first {
                    return Err(PackingFileError::Reversed { tensor: tensor.name.clone(), first, last });
                }
                references += u64::from(last - first) + 1;
                if references > PackingFile::MAX_REFERENCES {
                    return Err(PackingFileError::TooLarge);
                }
            }
        }
        let blocks = |tensor: &FileTensor| tensor.blocks.iter().flat_map(|&[first, last]| first..=last).collect();
        Ok(PackingProblem::new(self.blocks_per_tensor_page, self.tensors.iter().map(blocks).collect()))
    }
}
