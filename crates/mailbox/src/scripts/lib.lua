-- Stands in front of every script: the head of a mailbox, its devices, routes and timers.
--
-- head   {s}:h:u:<app>:<user>  hash; no value is longer than 64 bytes, or Redis would unpack the hash
--   s  the state, packed (STATE), because parsing numbers costs more than anything else here:
--      the mark (see VERSION)
--      e  epoch
--      b  seq of the oldest kept entry, n + 1 where nothing is kept;  bc  the chain before it
--      n  seq of the newest entry, 0 at first;                        nc  the chain after it
--      x  when head and queue expire, ms
--      ct no entry is older than the mailbox keeps before this time, ms
--      kl no collapse key points below this seq; 0: there are none
--      dc how many devices are known
--      bt, nt  the bytes of all entries up to before b, and up to n, modulo 2^32
--   i  8-byte hashes of the newest accepted ids, newest last, fewer than 8
--   j0 to j6  eight older ones each, the oldest of the seven is overwritten
--   f  which of the seven is next, then the first byte of each id in them, so that they need not be
--      read: strings cost by the byte
--   k:<key>  the newest seq of a collapse key
--   n0 to n<dc - 1>  names of the known devices
--   y  until when nothing is dropped for being acknowledged (KEEPS_ALL), ms
--   d:<device>  a device, packed (DEVICE): the mark; its cursor seq, chain, generation;
--      when it is re-sent to, ms (0: not); re-sends so far; when it was last seen, ms; its last
--      connection attempt; how often in a row a re-send did not reach its node
-- queue  {s}:q:u:<app>:<user>  list: entries b..n, each a 37-byte header, then nt after it (I4), and
--        behind it its body
-- routes {s}:r:<app>:<user>    hash: device -> "node incarnation connection attempt platform", and what
--        a newer version writes behind the platform, which has no blank; expires (set_route)
-- timers {s}:t                 zset: app NUL user -> the earliest due time of its devices
--
-- Newer beside older: a newer version that has more to keep adds fields to the head, or bytes behind
-- STATE and DEVICE; both are left as they are here (the tail). The high four flags are critical: who
-- does not know one that is set must not touch the mailbox, so the script writes nothing of it and
-- answers 'U' (connect, confirm, read, ack, disconnect, fire and defer the item, accept the group).
--
-- Numbers stay below 2^53. Packed integers wrap without a word, so what enters is clamped: attempts
-- and seqs before they come here, generations here; a seq that has no successor is an error. The time
-- is Redis's own, frozen while a script runs; replies begin with it in microseconds.

local KEYS, ARGV = KEYS, ARGV -- a local is found faster than a global
local call, floor, match = redis.call, math.floor, string.match
local pack, parse = struct.pack, struct.unpack
local TIME = call('TIME')
local NOW_US = TIME[1] * 1000000 + TIME[2]
local NOW = floor(NOW_US / 1000)
local byte, format, rol, bxor = string.byte, string.format, bit.rol, bit.bxor
-- A state and a device begin with their mark: the version, and flags in the second byte, of which the
-- low four may be ignored, but are kept, and the high four are critical. The short paths take only what
-- has no flag (its mark is the version) and no tail. H and I are two and four bytes: each digit of a
-- format is parsed in each call.
local VERSION, CRITICAL = 3, 16
-- A plain flag of a state, as the mark has it: nothing is dropped because it was acknowledged, as Redis may
-- have forgotten other devices of the user.
local KEEPS_ALL = 256
-- No mailbox keeps all for longer, ms: a later time was written while Redis's clock was ahead.
local KEEP_MAX = 86400000
-- A field of {s}:o: when something of the shard was found missing, ms.
local LOST = 'lost'
local STATE, STATE_BYTES = '<HI7I6II6II6I6I6BII', 56
local DEVICE, DEVICE_BYTES = '<HI6III6BI6I7B', 37
local HEADER_BYTES, HEADER_KEPT_BYTES = 37, 41
local SEQ_MAX, BYTE_MAX, WRAP = 281474976710655, 255, 4294967296
-- Devices name generations of 31 bits. What one claims leaves room for as many resets as it will ever see.
local GENERATION_MAX, CLAIMED_GENERATION_MAX = 2147483647, 1073741823

-- A whole number as an argument: Redis's own conversion takes several times as long.
local function int(number)
  return format('%d', number)
end

-- A wait of `ms`, spread over ± `jitter`. Redis's math.random repeats itself in every script.
local random = (TIME[1] * 1000003 + TIME[2] * 7919) % 2147483648
local function spread(ms, jitter)
  random = (random * 1103515 + 12345) % 2147483648
  return floor(ms * (1 + jitter * (random / 1073741824 - 1)))
end

-- One step of the chain (barid_core::Chain::step): MurmurHash3's body over a CRC-32.
local function chain_step(chain, crc)
  return (rol(bxor(chain, crc), 13) * 5 + 0xe6546b64) % 4294967296
end

-- The header of the entry at `seq`.
local function header_at(h, queue, seq)
  return call('LINDEX', queue, int((seq - h.b) * 2))
end

-- The chain after an entry.
local function header_chain(header)
  return (parse('<I', header, 25))
end

-- The chain after an entry, and the bytes up to there (0 where an entry lacks them).
local function header_place(header)
  if #header < HEADER_KEPT_BYTES then return header_chain(header), 0 end
  local chain, _, _, bytes = parse('<IBI8I', header, 25)
  return chain, bytes
end

-- What a pcall caught: Redis hands on texts and tables.
local function problem_text(problem)
  return type(problem) == 'table' and problem.err or tostring(problem)
end

-- Thrown where a newer version has marked what it wrote as critical; see above.
local UNKNOWN = 'written by a newer version'
local function is_unknown(problem)
  return problem_text(problem) == UNKNOWN
end

-- Looks at the version and the flags of a state or a device.
local function check_known(text)
  local version, flags = byte(text, 1, 2)
  if flags and (version > VERSION or flags >= CRITICAL) then error(UNKNOWN, 0) end
end

local function parse_head(key, state)
  check_known(state)
  if #state < STATE_BYTES or byte(state) ~= VERSION then error('corrupt head') end
  local mark, e, b, bc, n, nc, x, ct, kl, dc, bt, nt = parse(STATE, state)
  return { key = key, mark = mark, e = e, b = b, bc = bc, n = n, nc = nc, x = x, ct = ct, kl = kl,
    dc = dc, bt = bt, nt = nt, tail = string.sub(state, STATE_BYTES + 1) }
end

local function head_state(h)
  return pack(STATE, h.mark, h.e, h.b, h.bc, h.n, h.nc, h.x, h.ct, h.kl, h.dc, h.bt, h.nt)
    .. h.tail
end

local function save_head(h)
  call('HSET', h.key, 's', head_state(h))
end

-- The mailbox's head; nil where there is none.
local function find_head(key)
  local state = call('HGET', key, 's')
  return state and parse_head(key, state)
end

-- A new life of a mailbox. Whoever writes to it deletes what is left of an old one first.
local function new_head(key, candidate)
  return { key = key, mark = VERSION, e = tonumber(candidate), b = 1, bc = 0, n = 0, nc = 0, x = 0, ct = 0,
    kl = 0, dc = 0, bt = 0, nt = 0, tail = '', is_new = true }
end

-- Before the first write to a mailbox. Head and queue expire together: at the same moment, renewed
-- when a sixteenth has passed, so that both live for `ttl` at least.
local function open(h, queue, ttl)
  if h.is_new then call('DEL', h.key, queue) end
  if h.x - NOW >= ttl then return end
  h.x = NOW + ttl + floor(ttl / 16)
  save_head(h)
  call('PEXPIREAT', h.key, int(h.x))
  call('PEXPIREAT', queue, int(h.x))
end

-- The chain after a position; nil where the entry is not kept.
local function chain_at(h, queue, seq)
  if seq == h.n then return h.nc end
  if seq == h.b - 1 then return h.bc end
  if seq < h.b or seq > h.n then return nil end
  return header_chain(header_at(h, queue, seq))
end

local function parse_device(name, text)
  check_known(text)
  if #text < DEVICE_BYTES or byte(text) ~= VERSION then error('corrupt device') end
  local mark, seq, chain, generation, due, attempt, used, fence, defers = parse(DEVICE, text)
  return { name = name, mark = mark, seq = seq, chain = chain, generation = generation, due = due,
    attempt = attempt, used = used, fence = fence, defers = defers,
    tail = string.sub(text, DEVICE_BYTES + 1) }
end

-- A device that nothing is known of: everything that is kept is before it.
local function new_device(h, name, generation)
  return { name = name, mark = VERSION, seq = h.b - 1, chain = h.bc, due = 0, attempt = 0, used = NOW,
    generation = math.min(generation, CLAIMED_GENERATION_MAX), fence = 0, defers = 0, tail = '' }
end

local function find_device(h, name)
  local text = not h.is_new and call('HGET', h.key, 'd:' .. name)
  return text and parse_device(name, text)
end

local function device_state(d)
  return pack(DEVICE, d.mark, d.seq, d.chain, d.generation, d.due, d.attempt, d.used, d.fence,
    d.defers) .. d.tail
end

local function save_device(h, d)
  call('HSET', h.key, 'd:' .. d.name, device_state(d))
end

local function save(h, d)
  call('HSET', h.key, 's', head_state(h), 'd:' .. d.name, device_state(d))
end

-- All known devices, but for `except`, which is known.
local function other_devices(h, except)
  local devices = {}
  if h.dc == (except and 1 or 0) then return devices end
  local slots, names, fields = {}, {}, {}
  for i = 1, h.dc do slots[i] = 'n' .. i - 1 end
  for _, name in ipairs(call('HMGET', h.key, unpack(slots))) do
    if name and name ~= except then
      names[#names + 1] = name
      fields[#fields + 1] = 'd:' .. name
    end
  end
  if #names == 0 then return devices end
  local texts = call('HMGET', h.key, unpack(fields))
  for i, name in ipairs(names) do
    if texts[i] then devices[#devices + 1] = parse_device(name, texts[i]) end
  end
  return devices
end

-- Writes the names of the known devices; the caller saves the head.
local function save_names(h, devices)
  local fields = {}
  for i, d in ipairs(devices) do
    fields[#fields + 1], fields[#fields + 2] = 'n' .. i - 1, d.name
  end
  call('HSET', h.key, unpack(fields))
  for i = #devices, h.dc - 1 do call('HDEL', h.key, 'n' .. i) end
  h.dc = #devices
end

-- Makes `d` a known device; the caller saves both. Where there are `max` others, the one without a route that was unused
-- for longest is forgotten; false: all of them are online.
local function add_device(h, routes, d, others, max)
  while #others >= max do
    local oldest
    for i, other in ipairs(others) do
      if (not oldest or other.used < others[oldest].used)
        and call('HEXISTS', routes, other.name) == 0 then
        oldest = i
      end
    end
    if not oldest then return false end
    call('HDEL', h.key, 'd:' .. others[oldest].name)
    table.remove(others, oldest)
  end
  local devices = { unpack(others) }
  devices[#devices + 1] = d
  save_names(h, devices)
  return true
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

-- Writes a route. All of a user's expire together, when none of them has been connected or confirmed for
-- `ttl` at least: a node that died confirms nothing, and nobody may ever write to its users again. Once
-- in a sixteenth, because it tells every dispatcher that has cached them. (HSET keeps a time to live; a
-- hash that was empty in between has none.)
local function set_route(routes, name, text, ttl)
  if text then call('HSET', routes, name, text) end
  if call('PTTL', routes) < ttl then
    call('PEXPIREAT', routes, int(NOW + ttl + floor(ttl / 16)))
  end
end

-- Sets the user's timer to the earliest due time of these devices, or removes it.
local function set_timer(timers, member, devices)
  local due = 0
  for _, d in ipairs(devices) do
    if d.due > 0 and (due == 0 or d.due < due) then due = d.due end
  end
  if due == 0 then
    call('ZREM', timers, member)
  else
    call('ZADD', timers, int(due), member)
  end
  return due
end

-- Drops collapse keys that point below the oldest entry; the caller saves the head. It costs as much as
-- the head is large, so while entries are kept it is done once in so many positions.
local SWEEP_EVERY = 64
local function sweep_keys(h)
  if h.kl == 0 or h.kl >= h.b or h.b <= h.n and h.b - h.kl < SWEEP_EVERY then return end
  local fields, lowest = call('HGETALL', h.key), 0
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'k:' then
      local seq = tonumber(fields[i + 1])
      if seq < h.b then
        call('HDEL', h.key, fields[i])
      elseif lowest == 0 or seq < lowest then
        lowest = seq
      end
    end
  end
  h.kl = lowest
end

-- Drops the entries up to `seq`; `chain` and `bytes` are those after it. The caller saves the head.
local function trim(h, queue, seq, chain, bytes)
  if seq < h.b then return end
  if seq == h.n then
    call('DEL', queue)
  else
    call('LTRIM', queue, int((seq - h.b + 1) * 2), '-1')
  end
  h.b, h.bc, h.bt = seq + 1, chain, bytes
  sweep_keys(h)
end

-- The mailbox keeps all until then: the caller saves the head.
local function keep_all(h, till)
  if h.mark % (KEEPS_ALL * 2) < KEEPS_ALL then h.mark = h.mark + KEEPS_ALL end
  call('HSET', h.key, 'y', int(till))
end

local function keeps_all(h)
  return h.mark % (KEEPS_ALL * 2) >= KEEPS_ALL
end

-- Whether more than half of Redis's memory is used. What is kept for devices that may return must not keep
-- messages from being accepted. Looked up at most once a call, and only where a mailbox keeps all.
local short
local function is_short()
  if short == nil then
    local info = redis.pcall('INFO', 'memory')
    info = type(info) == 'string' and info or ''
    local used, max = match(info, 'used_memory:(%d+)'), match(info, 'maxmemory:(%d+)')
    short = used and max and tonumber(max) > 0 and used * 2 > tonumber(max) or false
  end
  return short
end

-- Whether acknowledged entries may be dropped. Ends the time in which they are kept, if that is over.
local function may_trim(h)
  if not keeps_all(h) then return true end
  local till = tonumber(call('HGET', h.key, 'y') or 0)
  if till > NOW and till - NOW <= KEEP_MAX and not is_short() then return false end
  call('HDEL', h.key, 'y')
  h.mark = h.mark - KEEPS_ALL
  return true
end

-- The mailbox keeps what its slowest known device needs; the caller saves the head.
local function trim_to_lowest(h, queue, d, others)
  local lowest = d
  for _, other in ipairs(others) do
    if other.seq < lowest.seq then lowest = other end
  end
  if not may_trim(h) or lowest.seq < h.b then return end
  local header = lowest.seq < h.n and header_at(h, queue, lowest.seq)
  local _, bytes = 0, h.nt
  if header then _, bytes = header_place(header) end
  trim(h, queue, lowest.seq, lowest.chain, bytes)
end

-- A generation that a device names: what resets add to it must fit.
local function claimed(d, generation)
  return math.min(generation, math.max(d.generation, CLAIMED_GENERATION_MAX))
end

-- Puts a device's cursor before the oldest kept entry, with a new generation. A cursor that is further back
-- stays, and a device from another life of the mailbox starts at 0: then the node tells the device that
-- the entries in between are gone.
local function reset_device(h, d, generation, from_another_life)
  d.generation =
    math.min(math.max(d.generation, claimed(d, generation)) + 1, GENERATION_MAX)
  if from_another_life then
    d.seq, d.chain = 0, 0
  elseif d.seq >= h.b then
    d.seq, d.chain = h.b - 1, h.bc
  end
end

-- Runs `step` for each item; an item's error is that item's alone. `unknown` is told of an item that a
-- newer version has marked; nothing was written of it.
local function each(count, step, keys, args, first, unknown)
  local replies, i = { NOW_US }, 0
  local function rest() -- until one fails: a pcall for each would cost more
    while i < count do
      replies[i + 2] = step(i * keys + 1, i * args + first)
      i = i + 1
    end
  end
  while i < count do
    local ok, problem = pcall(rest)
    if not ok then
      replies[i + 2] = is_unknown(problem) and { 'U' } or { 'E', problem_text(problem) }
      if unknown and is_unknown(problem) then unknown(i * keys + 1, i * args + first) end
      i = i + 1
    end
  end
  return replies
end
