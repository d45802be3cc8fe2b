//! Large objects, read and written in pieces, through the server's own SQL functions: these check privileges.

use super::interrupt;
use pgrx::{IntoDatum, direct_function_call, pg_sys};
use std::io::Write;

/// Bytes of one read or write: small against statement_timeout's half a second, large against the call's cost.
const PIECE: usize = 1 << 20;

/// A large object and a position in it.
pub struct LargeObject {
    oid: pg_sys::Oid,
    position: i64,
}

impl LargeObject {
    /// An existing object. Whether it exists and may be read shows at the first read.
    pub fn open(oid: pg_sys::Oid) -> LargeObject {
        LargeObject { oid, position: 0 }
    }

    /// Makes a new object, owned by the current role.
    pub fn create() -> LargeObject {
        // SAFETY: lo_create(0) lets the server choose the number.
        let oid = unsafe {
            let oid = direct_function_call::<pg_sys::Oid>(pg_sys::be_lo_create, &[pg_sys::InvalidOid.into_datum()]);
            // Makes the object visible to the calls that follow.
            pg_sys::CommandCounterIncrement();
            oid
        };
        LargeObject { oid: oid.unwrap_or(pg_sys::InvalidOid), position: 0 }
    }

    /// The object's number.
    pub fn oid(&self) -> pg_sys::Oid {
        self.oid
    }

    /// Everything from the position on.
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            interrupt::check();
            let args = [self.oid.into_datum(), self.position.into_datum(), (PIECE as i32).into_datum()];
            // SAFETY: lo_get(oid, bigint, integer); the result is a palloc'd bytea, copied and freed.
            let n = unsafe {
                let piece = direct_function_call::<pg_sys::Datum>(pg_sys::be_lo_get_fragment, &args);
                let Some(piece) = piece else { return all };
                let piece = piece.cast_mut_ptr::<pg_sys::varlena>();
                let bytes = super::varlena::payload(piece);
                all.extend_from_slice(bytes);
                let n = bytes.len();
                pg_sys::pfree(piece.cast());
                n
            };
            self.position += n as i64;
            if n < PIECE {
                return all;
            }
        }
    }
}

impl Write for LargeObject {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        interrupt::check();
        let piece = &bytes[..bytes.len().min(PIECE)];
        if !piece.is_empty() {
            let args = [self.oid.into_datum(), self.position.into_datum(), Some(super::fmgr::varlena_datum(&[piece]))];
            // SAFETY: lo_put(oid, bigint, bytea) returns void; the bytea is freed after the call.
            unsafe {
                pgrx::direct_function_call_as_datum(pg_sys::be_lo_put, &args);
                pg_sys::pfree(args[2].expect("made above").cast_mut_ptr());
            }
            self.position += piece.len() as i64;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
