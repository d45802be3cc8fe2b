//! What is searched for, and how finely.

use std::str::FromStr;

/// Most bands of a signature: 4 kB a block.
const MAX_BANDS: u32 = 1024;
/// Most hashes of a band: more of them tell nothing more apart.
const MAX_HASHES_PER_BAND: u32 = 32;
/// Most elements that a hash is taken over: the signs take four bytes each.
pub(super) const MAX_SPAN: usize = 1 << 24;

/// Why there is no index with these options.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum NearError {
    /// Not a positive finite number.
    #[error("radius {0} is not a positive number")]
    Radius(f64),
    /// Not a positive finite number.
    #[error("tolerance {0} is not a positive number")]
    Tolerance(f32),
    /// Radius and tolerance make a bucket width that cannot be computed with.
    #[error("radius {radius} and tolerance {tolerance} make no usable bucket width")]
    Width {
        /// The option.
        radius: f64,
        /// The option.
        tolerance: f32,
    },
    /// Not between 0 and 1.
    #[error("share {0} is not between 0 and 1")]
    Share(f64),
    /// None, or too many.
    #[error("{0} bands are outside the range of 1 to {MAX_BANDS}")]
    Bands(u32),
    /// None, or too many.
    #[error("{0} hashes per band are outside the range of 1 to {MAX_HASHES_PER_BAND}")]
    HashesPerBand(u32),
    /// Blocks without elements are all equal.
    #[error("blocks without elements have no near duplicates")]
    NoElements,
    /// A hash would be taken over more elements than there may be signs.
    #[error("a hash over {0} elements is longer than {MAX_SPAN}")]
    Span(usize),
}

/// Which elements of a block the hashes of one band are taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// Each band over a run of neighbours of its own; `radius` is in units of the distance of two runs that differ by
    /// the tolerance in every element, so that one value fits all block sizes and tolerances.
    ///
    /// A block in which some rows are others has the bands of the other rows, and the price of all bands is a pass.
    Run,
    /// Every band over the whole block, and `radius` is an absolute distance, as published.
    Block,
}

impl FromStr for Span {
    type Err = ();

    /// "run" or "block".
    fn from_str(text: &str) -> Result<Span, ()> {
        match text {
            "run" => Ok(Span::Run),
            "block" => Ok(Span::Block),
            _ => Err(()),
        }
    }
}

/// Options of a search.
///
/// The defaults were found by measurement on blocks of 128 x 128 float32, see `examples/near_duplicates.rs`. The
/// tolerance is the one that depends on the weights: below a third of their standard deviation unrelated blocks are
/// told apart by their hashes, above it nearly every block is a candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NearOptions {
    /// Bucket width, see [`Span`] for its unit. Wider: more of the near duplicates are found, and more others.
    pub radius: f64,
    /// What bands are taken over.
    pub span: Span,
    /// Bands; blocks with one in common are candidates. 1 to 1024; each takes 13 to 24 bytes a block in the index.
    pub bands: u32,
    /// Hashes that must all agree for a band to be in common, 1 to 32.
    pub hashes_per_band: u32,
    /// Elements are alike up to this difference.
    pub tolerance: f32,
    /// The least fraction of elements within the tolerance at which a block may stand in for another, 0 to 1.
    pub share: f64,
    /// The hash functions are drawn by it. Signatures of different seeds do not compare.
    pub seed: u64,
}

impl Default for NearOptions {
    fn default() -> NearOptions {
        NearOptions {
            radius: 6.0,
            span: Span::Run,
            bands: 64,
            hashes_per_band: 16,
            tolerance: 0.01,
            share: 0.7,
            seed: 0,
        }
    }
}

impl NearOptions {
    /// netsDB's: r = 0.09, 90 bands of one hash over the whole block, 70 % of the elements within 0.01.
    ///
    /// Its blocks have a million elements. Its projections are drawn from a normal distribution, these are of random
    /// signs, which sum up to nearly the same.
    pub const fn published() -> NearOptions {
        NearOptions {
            radius: 0.09,
            span: Span::Block,
            bands: 90,
            hashes_per_band: 1,
            tolerance: 0.01,
            share: 0.7,
            seed: 0,
        }
    }

    /// Says which option is out of its range.
    pub fn validate(&self) -> Result<(), NearError> {
        if !(self.radius.is_finite() && self.radius > 0.0) {
            return Err(NearError::Radius(self.radius));
        }
        if !(self.tolerance.is_finite() && self.tolerance > 0.0) {
            return Err(NearError::Tolerance(self.tolerance));
        }
        if !(0.0..=1.0).contains(&self.share) {
            return Err(NearError::Share(self.share));
        }
        if !(1..=MAX_BANDS).contains(&self.bands) {
            return Err(NearError::Bands(self.bands));
        }
        if !(1..=MAX_HASHES_PER_BAND).contains(&self.hashes_per_band) {
            return Err(NearError::HashesPerBand(self.hashes_per_band));
        }
        Ok(())
    }

    /// The bucket width of hashes over `len` elements.
    pub(super) fn width(&self, len: usize) -> Result<f64, NearError> {
        let width = match self.span {
            Span::Run => self.radius * f64::from(self.tolerance) * (len as f64).sqrt(),
            Span::Block => self.radius,
        };
        if width.is_normal() && width.recip().is_normal() {
            Ok(width)
        } else {
            Err(NearError::Width { radius: self.radius, tolerance: self.tolerance })
        }
    }
}
