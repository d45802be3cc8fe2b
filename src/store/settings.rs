//! Settings of the block store.

use pgrx::PostgresGucEnum;
use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use tensor_blocks::encoding;

/// What new blocks are compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
enum Compression {
    /// Nothing; constants and elements of half the width are stored small all the same.
    #[name = c"none"]
    None,
    /// Byte planes, each in Huffman's code, where that saves a tenth.
    #[name = c"huffman"]
    Huffman,
}

static COMPRESSION: GucSetting<Compression> = GucSetting::<Compression>::new(Compression::None);

/// Registers the settings. Called once, when the library is loaded.
pub fn init() {
    GucRegistry::define_enum_guc(
        c"tessera.block_compression",
        c"Sets with what tensor blocks are compressed when they are stored.",
        c"huffman takes about a sixth off trained float32 weights, without loss, and makes reading them from the tables somewhat slower; what is in the block cache is as it is either way. It suits models that are kept and seldom read. Blocks that are stored already stay as they are.",
        &COMPRESSION,
        GucContext::Userset,
        GucFlags::default(),
    );
}

/// What may be spent on a smaller form of a new block.
pub fn compression() -> encoding::Compression {
    match COMPRESSION.get() {
        Compression::None => encoding::Compression::None,
        Compression::Huffman => encoding::Compression::Huffman,
    }
}
