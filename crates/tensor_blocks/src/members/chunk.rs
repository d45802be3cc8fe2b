//! A part of a set's map: names of members, and where their segments lie.
//!
//! ```text
//!  names:    | count u16 | per member: length u8, bytes |       ascending by bytes
//!  places:   | per member, per segment: block u32, offset u16 |
//!  recipes:  | per trained member: its number u16, content hash 32, fingerprint of its data 32 |
//!  each:     ... | checksum, 7 bytes of BLAKE3 over kind and bytes | version u8 |
//! ```
//!
//! A place that was damaged would be a place of other parameters, and so a wrong prediction: hence the checksum.

use super::Place;

/// Members of a whole chunk.
pub const CHUNK_MEMBERS: usize = 512;
/// Most bytes of a member's name.
const NAME_MAX: usize = u8::MAX as usize;

/// The version of the stored forms.
const VERSION: u8 = 1;
/// Bytes of the checksum.
const SUM: usize = 7;

/// One of the three stored forms.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Names,
    Places,
    Recipes,
}

impl Part {
    fn sum(self, bytes: &[u8]) -> [u8; SUM] {
        const CONTEXT: &str = "pg_tessera part of a model set's map v1";
        let hash = *blake3::Hasher::new_derive_key(CONTEXT).update(&[self as u8]).update(bytes).finalize().as_bytes();
        std::array::from_fn(|at| hash[at])
    }

    fn seal(self, mut bytes: Vec<u8>) -> Vec<u8> {
        let sum = self.sum(&bytes);
        bytes.extend_from_slice(&sum);
        bytes.push(VERSION);
        bytes
    }

    /// What was stored of this kind.
    ///
    /// # Errors
    /// [`ChunkError`] for another version, or if it is not what was stored.
    pub(super) fn open(self, stored: &[u8]) -> Result<&[u8], ChunkError> {
        let (&version, rest) = stored.split_last().ok_or(ChunkError("it is empty"))?;
        if version != VERSION {
            return Err(ChunkError("it has a version that this pg_tessera does not read"));
        }
        let (bytes, sum) = rest.split_last_chunk::<SUM>().ok_or(ChunkError("it is cut off"))?;
        if *sum != self.sum(bytes) { Err(ChunkError("its checksum does not fit")) } else { Ok(bytes) }
    }
}

/// How a member came about that is not stored but trained again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Identity of graph and tensors of the member.
    pub content: [u8; 32],
    /// Identity of the rows that it was trained with; zeros for a member that was not trained for this set.
    pub data: [u8; 32],
}

impl Recipe {
    /// That of a member which is taken over as it is from the set that its own is based on, where it has a recipe.
    pub fn inherited(self) -> Recipe {
        Recipe { content: self.content, data: [0; 32] }
    }

    /// Whether the member is that of the set that its own is based on.
    pub fn is_inherited(&self) -> bool {
        self.data == [0; 32]
    }
}

/// Some neighbouring members of a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Ascending.
    pub names: Vec<String>,
    /// By member, as many as there are segments.
    pub places: Vec<Place>,
    /// Ascending by the member's number.
    pub recipes: Vec<(u16, Recipe)>,
}

/// Why bytes are no chunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a part of a model set's map is damaged: {0}")]
pub struct ChunkError(&'static str);

impl Chunk {
    /// Stored form of the names.
    ///
    /// # Panics
    /// If there are more than 65535, or one has more than 255 bytes.
    pub fn encode_names(&self) -> Vec<u8> {
        let count = u16::try_from(self.names.len()).expect("a chunk has few members");
        let mut out = count.to_le_bytes().to_vec();
        for name in &self.names {
            assert!(name.len() <= NAME_MAX, "a member's name is short");
            out.push(name.len() as u8);
            out.extend_from_slice(name.as_bytes());
        }
        Part::Names.seal(out)
    }

    /// Stored form of the places.
    pub fn encode_places(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.places.len() * Place::BYTES);
        self.places.iter().for_each(|place| place.write(&mut out));
        Part::Places.seal(out)
    }

    /// Stored form of the recipes.
    pub fn encode_recipes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.recipes.len() * 66);
        for (member, recipe) in &self.recipes {
            out.extend_from_slice(&member.to_le_bytes());
            out.extend_from_slice(&recipe.content);
            out.extend_from_slice(&recipe.data);
        }
        Part::Recipes.seal(out)
    }

    /// A chunk from its stored forms, for members of so many segments.
    ///
    /// # Errors
    /// [`ChunkError`] if they contradict themselves or each other.
    pub fn decode(names: &[u8], places: &[u8], recipes: &[u8], segments: usize) -> Result<Chunk, ChunkError> {
        let (names, places, recipes) =
            (Part::Names.open(names)?, Part::Places.open(places)?, Part::Recipes.open(recipes)?);
        let (count, mut rest) = names.split_first_chunk::<2>().ok_or(ChunkError("the names are cut off"))?;
        let count = usize::from(u16::from_le_bytes(*count));
        let mut chunk = Chunk::default();
        for _ in 0..count {
            let (&len, tail) = rest.split_first().ok_or(ChunkError("the names are cut off"))?;
            let (name, tail) = tail.split_at_checked(usize::from(len)).ok_or(ChunkError("a name is cut off"))?;
            let name = std::str::from_utf8(name).map_err(|_| ChunkError("a name is no text"))?;
            if chunk.names.last().is_some_and(|last| last.as_str() >= name) {
                return Err(ChunkError("the names are out of order"));
            }
            chunk.names.push(name.to_owned());
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(ChunkError("there is something behind the names"));
        }
        let (places, tail) = places.as_chunks::<{ Place::BYTES }>();
        if !tail.is_empty() || places.len() != count * segments {
            return Err(ChunkError("the number of places does not fit"));
        }
        chunk.places = places.iter().map(Place::read).collect();
        let (recipes, tail) = recipes.as_chunks::<66>();
        if !tail.is_empty() {
            return Err(ChunkError("the recipes are cut off"));
        }
        for recipe in recipes {
            let member = u16::from_le_bytes([recipe[0], recipe[1]]);
            let after = chunk.recipes.last().is_none_or(|(last, _)| *last < member);
            if usize::from(member) >= count || !after {
                return Err(ChunkError("the recipes are out of order"));
            }
            let hash = |from: usize| <[u8; 32]>::try_from(&recipe[from..from + 32]).unwrap_or_default();
            chunk.recipes.push((member, Recipe { content: hash(2), data: hash(34) }));
        }
        Ok(chunk)
    }

    /// The number of the member with this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.names.binary_search_by(|known| known.as_str().cmp(name)).ok()
    }

    /// The places of a member's segments.
    pub fn places_of(&self, member: usize, segments: usize) -> &[Place] {
        &self.places[member * segments..(member + 1) * segments]
    }

    /// How a member is trained; none if it is stored.
    pub fn recipe_of(&self, member: usize) -> Option<&Recipe> {
        let at = self.recipes.binary_search_by_key(&member, |(number, _)| usize::from(*number)).ok()?;
        Some(&self.recipes[at].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk() -> Chunk {
        Chunk {
            names: ["", "a", "a/b", "zellé"].map(str::to_owned).to_vec(),
            places: (0..12).map(|n| Place { block: n * 1_000_003, at: (n * 5000) as u16 }).collect(),
            recipes: vec![
                (1, Recipe { content: [1; 32], data: [2; 32] }),
                (3, Recipe { content: [3; 32], data: [4; 32] }),
            ],
        }
    }

    #[test]
    fn chunks_come_back() {
        let whole = chunk();
        let (names, places, recipes) = (whole.encode_names(), whole.encode_places(), whole.encode_recipes());
        let back = Chunk::decode(&names, &places, &recipes, 3).unwrap();
        assert_eq!(back, whole);
        assert_eq!(back.find("a/b"), Some(2));
        assert_eq!(back.find("b"), None);
        assert_eq!(back.places_of(2, 3), &whole.places[6..9]);
        assert_eq!(back.recipe_of(3).unwrap().data, [4; 32]);
        assert!(back.recipe_of(0).is_none());
    }

    #[test]
    fn damage_is_an_error() {
        let whole = chunk();
        let (names, places, recipes) = (whole.encode_names(), whole.encode_places(), whole.encode_recipes());
        for cut in 0..names.len() {
            assert!(Chunk::decode(&names[..cut], &places, &recipes, 3).is_err());
        }
        for cut in 0..places.len() {
            assert!(Chunk::decode(&names, &places[..cut], &recipes, 3).is_err());
        }
        for cut in 0..recipes.len() {
            assert!(Chunk::decode(&names, &places, &recipes[..cut], 3).is_err());
        }
        assert!(Chunk::decode(&names, &places, &recipes, 4).is_err());
        assert!(Chunk::decode(&names, &recipes, &places, 3).is_err());
        assert!(Chunk::decode(&[names.clone(), vec![0]].concat(), &places, &recipes, 3).is_err());
        // Every single bit changed.
        for part in 0..3 {
            let mut parts = [names.clone(), places.clone(), recipes.clone()];
            for bit in 0..8 * parts[part].len() {
                parts[part][bit / 8] ^= 1 << (bit % 8);
                assert!(Chunk::decode(&parts[0], &parts[1], &parts[2], 3).is_err());
                parts[part][bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn what_is_sealed_but_contradicts_itself_is_an_error() {
        let whole = chunk();
        let (names, places, recipes) = (whole.encode_names(), whole.encode_places(), whole.encode_recipes());
        let inner = |part: Part, stored: &[u8]| part.open(stored).unwrap().to_vec();
        let plain = inner(Part::Names, &names);
        for cut in 0..plain.len() {
            assert!(Chunk::decode(&Part::Names.seal(plain[..cut].to_vec()), &places, &recipes, 3).is_err());
        }
        // An error or another chunk, never a panic.
        for at in 0..plain.len() {
            let mut bytes = plain.clone();
            bytes[at] ^= 0x81;
            let _ = Chunk::decode(&Part::Names.seal(bytes), &places, &recipes, 3);
        }
        let plain = inner(Part::Recipes, &recipes);
        let swapped = Part::Recipes.seal([&plain[66..], &plain[..66]].concat());
        assert!(Chunk::decode(&names, &places, &swapped, 3).is_err());
    }
}
