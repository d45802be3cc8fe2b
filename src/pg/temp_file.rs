//! Temporary files of a statement: PostgreSQL's own, so that `temp_file_limit`, `log_temp_files` and the statistics hold.

use super::error;
use inference::error::ModelError;
use inference::weights::SpillFile;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// A temporary file. It ends when dropped, and with the transaction on an ERROR.
pub struct TempFile {
    file: *mut pg_sys::BufFile,
    /// Bytes written.
    len: u64,
}

// SAFETY: it is moved to no other thread: a run on the compute thread asks this one to write and read.
unsafe impl Send for TempFile {}

impl TempFile {
    /// A new, empty file.
    pub fn new() -> TempFile {
        // SAFETY: in a transaction; the file belongs to the current resource owner.
        unsafe {
            pg_sys::PrepareTempTablespaces();
            TempFile { file: pg_sys::BufFileCreateTemp(false), len: 0 }
        }
    }

    fn seek(&mut self, offset: u64) {
        // SAFETY: an open file.
        let failed = unsafe { pg_sys::BufFileSeek(self.file, 0, offset as i64, libc::SEEK_SET) };
        if failed != 0 {
            unreadable();
        }
    }
}

fn unreadable() -> ! {
    error::raise(PgSqlErrorCode::ERRCODE_IO_ERROR, "could not read from a temporary file of a prediction", "", "")
}

impl SpillFile for TempFile {
    fn append(&mut self, bytes: Vec<u8>) -> Result<(), ModelError> {
        super::interrupt::check();
        self.seek(self.len);
        // SAFETY: the bytes are there; an ERROR (disk full, temp_file_limit) leaves the file to the resource owner.
        unsafe { pg_sys::BufFileWrite(self.file, bytes.as_ptr().cast_mut().cast(), bytes.len()) };
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, ModelError> {
        super::interrupt::check();
        self.seek(offset);
        let mut bytes = vec![0u8; len];
        // SAFETY: there is room for `len` bytes.
        let read = unsafe { pg_sys::BufFileRead(self.file, bytes.as_mut_ptr().cast(), len) };
        if read != len {
            unreadable();
        }
        Ok(bytes)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: made by `new`, closed once. On unwinding, the resource owner closes it.
            unsafe { pg_sys::BufFileClose(self.file) }
        }
    }
}
