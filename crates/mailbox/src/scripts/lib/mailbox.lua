-- Second part of the scripts that touch mailboxes: the head of a mailbox, its devices, routes and timer.
--
-- head   {s}:h:u:<app>:<user>  hash. No value is longer than 64 bytes, or Redis would convert the hash from its
--        compact encoding.
--   s  the state, packed (STATE), because parsing text costs more than anything else here. In order:
--        mark                 version and flags, see VERSION
--        epoch
--        oldest               seq of the oldest entry; newest + 1 if there is none
--        chain_before_oldest
--        newest               seq of the newest entry; 0 at first
--        newest_chain         chain after it
--        expires_at           when head and queue expire, ms
--        age_check_at         before this time no entry is too old, ms
--        lowest_keyed         no collapse key refers to a lower seq; 0: there are no collapse keys
--        device_count
--        bytes_before_oldest, bytes_to_newest
--                             bytes of all entries ever stored, modulo 2^32: before the oldest, and up to the newest
--   i  8-byte hashes of the newest accepted message ids, newest last, fewer than 8
--   j0 to j6  chunks of eight older hashes each; the oldest chunk is overwritten
--   f  number of the chunk that is overwritten next, then the first byte of each hash in the chunks, which saves
--      reading them
--   k:<key>  newest seq of a collapse key
--   n0 to n<device_count - 1>  names of the known devices
--   y  until when acknowledged entries are kept (KEEPS_ALL), ms
--   d:<device>  a device, packed (DEVICE). In order:
--        mark
--        seq, chain, generation  its cursor
--        due_at               when the next re-send is due, ms; 0: none
--        resends              re-sends so far
--        used_at              when it was last seen, ms
--        last_attempt         its last connection attempt
--        defers               re-sends in a row that did not reach its node
-- queue  {s}:q:u:<app>:<user>  list, two elements per entry: a 37-byte header followed by bytes_to_newest as of this
--        entry (I4); the body
-- routes {s}:r:<app>:<user>    hash: device -> "node incarnation connection attempt platform"; the platform holds
--        no space, and newer versions may append more. Expires (set_route).
-- timers {s}:t                 zset: app NUL user -> the earliest due_at of its devices
--
-- Compatibility: a newer version that stores more adds fields to the head, or bytes behind STATE and DEVICE. Both
-- are preserved here (`tail`). The upper four flags are critical: a script that does not know one that is set writes
-- nothing to the mailbox and replies 'U' (accept: for the whole group).

local rol, bxor = bit.rol, bit.bxor
local min, max = math.min, math.max
-- A state and a device begin with a mark: the version, then flags. Unknown flags among the lower four are
-- preserved, the upper four are critical. Short paths handle only marks without flags (equal to VERSION) and records
-- without a tail. Formats say H and I instead of I2 and I4, because each digit is parsed at each call.
local VERSION, CRITICAL = 3, 16
-- A lower flag of a state, as part of the mark: no entry is dropped because it was acknowledged, as Redis may have
-- lost other devices of the user.
local KEEPS_ALL = 256
-- Longest time for which a mailbox keeps all, ms: a later time was written while Redis's clock was ahead.
local KEEP_MAX = 86400000
local STATE, STATE_BYTES = '<HI7I6II6II6I6I6BII', 56
local DEVICE, DEVICE_BYTES = '<HI6III6BI6I7B', 37
local HEADER_BYTES, STORED_HEADER_BYTES = 37, 41
local SEQ_MAX, BYTE_MAX = 281474976710655, 255
-- Generations have 31 bits on the wire. A claimed generation leaves room for all resets that follow.
local GENERATION_MAX, CLAIMED_GENERATION_MAX = 2147483647, 1073741823

-- Settings of the call; each script sets those that its functions use. How long a mailbox lives, ms; the first wait
-- before a re-send, ms, and the share by which waits vary.
local TTL, RETRY_BASE, RETRY_JITTER

-- `ms`, varied at random by ± RETRY_JITTER. Redis seeds math.random alike for every script.
local random = (TIME[1] * 1000003 + TIME[2] * 7919) % 2147483648
local function spread(ms)
  random = (random * 1103515 + 12345) % 2147483648
  return floor(ms * (1 + RETRY_JITTER * (random / 1073741824 - 1)))
end

-- One step of the chain (barid_core::Chain::step): MurmurHash3's body over a CRC-32.
local function chain_step(chain, crc)
  return (rol(bxor(chain, crc), 13) * 5 + 0xe6546b64) % 4294967296
end

-- The stored header of the entry at `seq`.
local function header_at(mailbox, seq)
  return call('LINDEX', mailbox.queue, int((seq - mailbox.oldest) * 2))
end

-- The chain after an entry.
local function header_chain(header)
  return (parse('<I', header, 25))
end

-- The chain after an entry, and bytes_to_newest as of it (0 if the entry lacks it).
local function header_end(header)
  if #header < STORED_HEADER_BYTES then return header_chain(header), 0 end
  local chain, _, _, bytes = parse('<IBI8I', header, 25)
  return chain, bytes
end

-- Fails if a state or a device has an unknown version or a critical flag.
local function check_known(text)
  local version, flags = byte(text, 1, 2)
  if flags and (version > VERSION or flags >= CRITICAL) then error(UNKNOWN, 0) end
end

-- A mailbox with this head. `queue` may be nil where no entry is touched.
local function parse_mailbox(head, queue, state)
  check_known(state)
  if #state < STATE_BYTES or byte(state) ~= VERSION then error('corrupt head') end
  local mark, epoch, oldest, chain_before_oldest, newest, newest_chain, expires_at, age_check_at,
    lowest_keyed, device_count, bytes_before_oldest, bytes_to_newest = parse(STATE, state)
  return {
    head = head, queue = queue, mark = mark, epoch = epoch,
    oldest = oldest, chain_before_oldest = chain_before_oldest,
    newest = newest, newest_chain = newest_chain,
    expires_at = expires_at, age_check_at = age_check_at,
    lowest_keyed = lowest_keyed, device_count = device_count,
    bytes_before_oldest = bytes_before_oldest, bytes_to_newest = bytes_to_newest,
    tail = sub(state, STATE_BYTES + 1),
  }
end

-- A new life of a mailbox. `open` deletes what is left of an earlier one.
local function new_mailbox(head, queue, epoch_candidate)
  return {
    head = head, queue = queue, mark = VERSION, epoch = tonumber(epoch_candidate),
    oldest = 1, chain_before_oldest = 0, newest = 0, newest_chain = 0,
    expires_at = 0, age_check_at = 0, lowest_keyed = 0, device_count = 0,
    bytes_before_oldest = 0, bytes_to_newest = 0, tail = '', is_new = true,
  }
end

-- The mailbox with this head; nil if it does not exist.
local function find_mailbox(head, queue)
  local state = call('HGET', head, 's')
  return state and parse_mailbox(head, queue, state)
end

local function mailbox_state(mailbox)
  return pack(STATE, mailbox.mark, mailbox.epoch, mailbox.oldest, mailbox.chain_before_oldest,
    mailbox.newest, mailbox.newest_chain, mailbox.expires_at, mailbox.age_check_at,
    mailbox.lowest_keyed, mailbox.device_count, mailbox.bytes_before_oldest,
    mailbox.bytes_to_newest) .. mailbox.tail
end

-- Call before the first write to a mailbox. Head and queue expire at the same moment, which moves when a sixteenth
-- of the time to live has passed, so that both live for TTL at least.
local function open(mailbox)
  if mailbox.expires_at - NOW >= TTL then return end
  local head, queue = mailbox.head, mailbox.queue
  if mailbox.is_new then call('DEL', head, queue) end
  mailbox.expires_at = NOW + TTL + floor(TTL / 16)
  call('HSET', head, 's', mailbox_state(mailbox))
  call('PEXPIREAT', head, int(mailbox.expires_at))
  call('PEXPIREAT', queue, int(mailbox.expires_at))
end

-- The chain after a position; nil if the entry is not stored.
local function chain_at(mailbox, seq)
  if seq == mailbox.newest then return mailbox.newest_chain end
  if seq == mailbox.oldest - 1 then return mailbox.chain_before_oldest end
  if seq < mailbox.oldest or seq > mailbox.newest then return nil end
  return header_chain(header_at(mailbox, seq))
end

local function parse_device(name, text)
  check_known(text)
  if #text < DEVICE_BYTES or byte(text) ~= VERSION then error('corrupt device') end
  local mark, seq, chain, generation, due_at, resends, used_at, last_attempt, defers =
    parse(DEVICE, text)
  return {
    name = name, mark = mark, seq = seq, chain = chain, generation = generation,
    due_at = due_at, resends = resends, used_at = used_at, last_attempt = last_attempt,
    defers = defers, tail = sub(text, DEVICE_BYTES + 1),
  }
end

-- A device that is not known yet; its cursor is before the oldest entry.
local function new_device(mailbox, name, generation)
  return {
    name = name, mark = VERSION, seq = mailbox.oldest - 1, chain = mailbox.chain_before_oldest,
    generation = min(generation, CLAIMED_GENERATION_MAX), due_at = 0, resends = 0,
    used_at = NOW, last_attempt = 0, defers = 0, tail = '',
  }
end

local function find_device(mailbox, name)
  local text = not mailbox.is_new and call('HGET', mailbox.head, 'd:' .. name)
  return text and parse_device(name, text)
end

local function device_state(device)
  return pack(DEVICE, device.mark, device.seq, device.chain, device.generation, device.due_at,
    device.resends, device.used_at, device.last_attempt, device.defers) .. device.tail
end

local function save_device(mailbox, device)
  call('HSET', mailbox.head, 'd:' .. device.name, device_state(device))
end

local function save(mailbox, device)
  call('HSET', mailbox.head, 's', mailbox_state(mailbox), 'd:' .. device.name, device_state(device))
end

-- All known devices but `except`, which is known.
local function other_devices(mailbox, except)
  local devices = {}
  if mailbox.device_count == (except and 1 or 0) then return devices end
  local slots, names, fields = {}, {}, {}
  for i = 1, mailbox.device_count do slots[i] = 'n' .. i - 1 end
  for _, name in ipairs(call('HMGET', mailbox.head, unpack(slots))) do
    if name and name ~= except then
      names[#names + 1] = name
      fields[#fields + 1] = 'd:' .. name
    end
  end
  if #names == 0 then return devices end
  local texts = call('HMGET', mailbox.head, unpack(fields))
  for i, name in ipairs(names) do
    if texts[i] then devices[#devices + 1] = parse_device(name, texts[i]) end
  end
  return devices
end

-- Writes the names of the known devices; the caller saves the mailbox.
local function save_names(mailbox, devices)
  local fields = {}
  for i, device in ipairs(devices) do
    fields[#fields + 1], fields[#fields + 2] = 'n' .. i - 1, device.name
  end
  call('HSET', mailbox.head, unpack(fields))
  for i = #devices, mailbox.device_count - 1 do call('HDEL', mailbox.head, 'n' .. i) end
  mailbox.device_count = #devices
end

-- Makes `device` a known device; the caller saves it and the mailbox. If there are `devices_max` others, the one
-- without a route that was unused for longest is forgotten; false: all of them have routes.
local function add_device(mailbox, routes, device, others, devices_max)
  while #others >= devices_max do
    local unused
    for i, other in ipairs(others) do
      if (not unused or other.used_at < others[unused].used_at)
        and call('HEXISTS', routes, other.name) == 0 then
        unused = i
      end
    end
    if not unused then return false end
    call('HDEL', mailbox.head, 'd:' .. others[unused].name)
    table.remove(others, unused)
  end
  local devices = { unpack(others) }
  devices[#devices + 1] = device
  save_names(mailbox, devices)
  return true
end

-- Schedules the device's first re-send.
local function arm_device(device)
  device.due_at, device.resends = NOW + spread(RETRY_BASE), 0
end

-- Removes the device's due time.
local function disarm_device(device)
  device.due_at, device.resends, device.defers = 0, 0, 0
end

local function parse_route(text)
  local node, incarnation, connection, attempt, platform, tail =
    match(text, '^(%S+) (%d+) (%d+) (%d+) ?(%S*)(.*)$')
  if not node then error('corrupt route') end
  return {
    node = node, incarnation = incarnation, connection = connection,
    attempt = tonumber(attempt), platform = platform, tail = tail,
  }
end

-- Writes a route (`text` may be false). All routes of a user expire together, when none of them was connected or
-- confirmed for TTL at least: a node that died confirms nothing, and its users may never be written to again. The
-- expiry moves when a sixteenth of the time has passed, because a change invalidates every dispatcher's cache.
-- (HSET keeps a time to live; a hash that was empty in between has none.)
local function set_route(routes, name, text)
  if text then call('HSET', routes, name, text) end
  if call('PTTL', routes) < TTL then
    call('PEXPIREAT', routes, int(NOW + TTL + floor(TTL / 16)))
  end
end

-- Sets the user's timer to the earliest due time of these devices, or removes it. Returns that time, or 0.
local function set_timer(timers, member, devices)
  local earliest = 0
  for _, device in ipairs(devices) do
    local due_at = device.due_at
    if due_at > 0 and (earliest == 0 or due_at < earliest) then earliest = due_at end
  end
  if earliest == 0 then
    call('ZREM', timers, member)
  else
    call('ZADD', timers, int(earliest), member)
  end
  return earliest
end

-- Deletes collapse keys that refer to entries before the oldest; the caller saves the mailbox. The cost grows with
-- the head, so while there are entries it runs only once every SWEEP_EVERY positions.
local SWEEP_EVERY = 64
local function sweep_keys(mailbox)
  local oldest, lowest_keyed = mailbox.oldest, mailbox.lowest_keyed
  if lowest_keyed == 0 or lowest_keyed >= oldest
    or oldest <= mailbox.newest and oldest - lowest_keyed < SWEEP_EVERY then
    return
  end
  local fields, lowest = call('HGETALL', mailbox.head), 0
  for i = 1, #fields, 2 do
    if sub(fields[i], 1, 2) == 'k:' then
      local seq = tonumber(fields[i + 1])
      if seq < oldest then
        call('HDEL', mailbox.head, fields[i])
      elseif lowest == 0 or seq < lowest then
        lowest = seq
      end
    end
  end
  mailbox.lowest_keyed = lowest
end

-- Drops the entries up to `seq`; `chain` and `bytes` are as of that entry. The caller saves the mailbox.
local function trim(mailbox, seq, chain, bytes)
  if seq < mailbox.oldest then return end
  if seq == mailbox.newest then
    call('DEL', mailbox.queue)
  else
    call('LTRIM', mailbox.queue, int((seq - mailbox.oldest + 1) * 2), '-1')
  end
  mailbox.oldest, mailbox.chain_before_oldest = seq + 1, chain
  mailbox.bytes_before_oldest = bytes
  sweep_keys(mailbox)
end

local function keeps_all(mailbox)
  return mailbox.mark % (KEEPS_ALL * 2) >= KEEPS_ALL
end

-- Keeps all entries until this time; the caller saves the mailbox.
local function keep_all(mailbox, keep_until)
  if not keeps_all(mailbox) then mailbox.mark = mailbox.mark + KEEPS_ALL end
  call('HSET', mailbox.head, 'y', int(keep_until))
end

-- Whether more than half of Redis's memory is used: entries that are kept for devices that may return must not
-- prevent new messages from being accepted. Read at most once a call, and only for a mailbox that keeps all.
local is_short
local function is_memory_short()
  if is_short == nil then
    local info = redis.pcall('INFO', 'memory')
    info = type(info) == 'string' and info or ''
    local used, limit = match(info, 'used_memory:(%d+)'), match(info, 'maxmemory:(%d+)')
    is_short = used and limit and tonumber(limit) > 0 and used * 2 > tonumber(limit) or false
  end
  return is_short
end

-- Whether acknowledged entries may be dropped. Clears KEEPS_ALL if its time is over.
local function may_trim(mailbox)
  if not keeps_all(mailbox) then return true end
  local keep_until = tonumber(call('HGET', mailbox.head, 'y') or 0)
  if keep_until > NOW and keep_until - NOW <= KEEP_MAX and not is_memory_short() then
    return false
  end
  call('HDEL', mailbox.head, 'y')
  mailbox.mark = mailbox.mark - KEEPS_ALL
  return true
end

-- Drops the entries that all of these devices have acknowledged; the caller saves the mailbox.
local function trim_acknowledged(mailbox, device, others)
  local slowest = device
  for _, other in ipairs(others) do
    if other.seq < slowest.seq then slowest = other end
  end
  if not may_trim(mailbox) or slowest.seq < mailbox.oldest then return end
  local bytes = mailbox.bytes_to_newest
  if slowest.seq < mailbox.newest then
    bytes = select(2, header_end(header_at(mailbox, slowest.seq)))
  end
  trim(mailbox, slowest.seq, slowest.chain, bytes)
end

-- The generation that a device claims, clamped so that later resets have room.
local function clamped_generation(device, generation)
  return min(generation, max(device.generation, CLAIMED_GENERATION_MAX))
end

-- Puts a device's cursor before the oldest entry, with a new generation. A cursor that is further back stays there,
-- and a device from another life of the mailbox starts at 0: in both cases the node tells the device that entries
-- are gone.
local function reset_device(mailbox, device, generation, from_another_life)
  device.generation =
    min(max(device.generation, clamped_generation(device, generation)) + 1, GENERATION_MAX)
  if from_another_life then
    device.seq, device.chain = 0, 0
  elseif device.seq >= mailbox.oldest then
    device.seq, device.chain = mailbox.oldest - 1, mailbox.chain_before_oldest
  end
end
