//! Bounds that are part of the protocol or the Redis layout. All others are configurable.

/// App names, bytes.
pub const APP_BYTES_MAX: usize = 64;
/// User names, bytes.
pub const USER_BYTES_MAX: usize = 128;
/// Device names, bytes.
pub const DEVICE_BYTES_MAX: usize = 64;
/// Group names, bytes.
pub const GROUP_BYTES_MAX: usize = 64;
/// The name of the audience "everyone of an app" in frames. No group can have this name.
pub const EVERYONE: &str = "everyone";
/// Groups in a token, and the largest configurable bound of a session's subscriptions.
pub const GROUPS_MAX: usize = POSITIONS_MAX - 2;
/// Message ids, bytes.
pub const MESSAGE_ID_BYTES_MAX: usize = 128;
/// Node names, bytes.
pub const NODE_BYTES_MAX: usize = 64;
/// Collapse keys, bytes.
pub const COLLAPSE_KEY_BYTES_MAX: usize = 64;
/// Platform names in Hello, bytes.
pub const PLATFORM_BYTES_MAX: usize = 32;
/// SDK names in Hello, bytes.
pub const SDK_BYTES_MAX: usize = 64;
/// Positions in a Hello.
pub const POSITIONS_MAX: usize = 256;
/// The highest generation that a Hello may name. Resets never reach it, and it can be incremented within 32 bits.
pub const GENERATION_MAX: u32 = (1 << 31) - 1;
/// Numbers of the protocol stay below 2^53, which JSON and Lua represent exactly.
pub const WIRE_NUMBER_MAX: u64 = (1 << 53) - 1;
/// The longest time to live: ten years. Added to any time of this century, it stays below 2^53 microseconds.
pub const TTL_SECONDS_MAX: u64 = 10 * 366 * 24 * 3600;
/// The largest payload before compression. With its envelope it fits into a gRPC message between roles.
pub const PAYLOAD_BYTES_MAX: usize = 2 << 20;
/// Times in milliseconds stay below 2^53 microseconds: until the year 2255.
pub const TIME_MS_MAX: u64 = WIRE_NUMBER_MAX / 1000;
/// Re-sends of a message to an online device before its session is closed.
pub const RESENDS_MAX: u32 = 5;
/// The last second of the year 9999, seconds since the Unix epoch: no time is later. A time in milliseconds is.
pub const EPOCH_SECONDS_MAX: u64 = 253_402_300_799;
