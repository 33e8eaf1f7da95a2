-- Stands in front of every script: the head of a mailbox, its devices, routes and timers.
--
-- head   {s}:h:u:<app>:<user>  hash
--   e  epoch                    x  when head and queue expire, ms
--   b  seq of the oldest kept entry, n + 1 where nothing is kept;  bc  the chain before it
--   n  seq of the newest entry, 0 at first;                        nc  the chain after it
--   i  8-byte hashes of the last 64 accepted ids, newest last
--   ct no entry is older than the mailbox keeps before this time, ms
--   kl no collapse key points below this seq (absent: there are none);  k:<key>  its newest seq
--   ds names of the known devices, separated by NUL
--   d:<device>  "seq chain generation due attempt used fence": the cursor; when it is re-sent to,
--      ms (0: not); re-sends so far; when it was last seen, ms; its last connection attempt
-- queue  {s}:q:u:<app>:<user>  list: entries b..n, each a 37-byte header and a body
-- routes {s}:r:<app>:<user>    hash: device -> "node incarnation connection attempt platform"
-- timers {s}:t                 zset: app NUL user -> the earliest due time of its devices
--
-- Numbers stay below 2^53. The time is Redis's own, frozen while a script runs; replies begin with
-- it in microseconds.

local call, floor, match = redis.call, math.floor, string.match
local TIME = call('TIME')
local NOW_US = TIME[1] * 1000000 + TIME[2]
local NOW = floor(NOW_US / 1000)

local function int(number)
  return string.format('%.0f', number)
end

-- A wait of `ms`, spread over ± `jitter`. Redis's math.random repeats itself in every script.
local random = (TIME[1] * 1000003 + TIME[2] * 7919) % 2147483648
local function spread(ms, jitter)
  random = (random * 1103515 + 12345) % 2147483648
  return floor(ms * (1 + jitter * (random / 1073741824 - 1)))
end

-- One step of the chain (barid_core::Chain::step): MurmurHash3's body over a CRC-32.
local function chain_step(chain, crc)
  return (bit.rol(bit.bxor(chain, crc), 13) * 5 + 0xe6546b64) % 4294967296
end

-- The chain after an entry, from its header.
local function entry_chain(entry)
  return (struct.unpack('<I4', entry, 25))
end

-- The mailbox's head; nil where there is none. `more1` and `more2` are further
-- fields that are wanted.
local function find_head(key, more1, more2)
  local v
  if more1 then
    v = call('HMGET', key, 'e', 'b', 'bc', 'n', 'nc', 'x', 'ds', 'kl', more1, more2)
  else
    v = call('HMGET', key, 'e', 'b', 'bc', 'n', 'nc', 'x', 'ds', 'kl')
  end
  if not v[1] then return nil end
  local h = {
    key = key, e = tonumber(v[1]), b = tonumber(v[2]), bc = tonumber(v[3]),
    n = tonumber(v[4]), nc = tonumber(v[5]), x = tonumber(v[6]), ds = v[7] or '',
    kl = tonumber(v[8]), more1 = v[9], more2 = v[10],
  }
  if not (h.e and h.b and h.bc and h.n and h.nc and h.x) then error('corrupt head') end
  return h
end

-- Head and queue expire together: at the same moment, renewed when a sixteenth has passed, so that
-- both live for `ttl` at least.
local function renew(h, queue, ttl)
  if h.x - NOW < ttl then
    h.x = NOW + ttl + floor(ttl / 16)
    call('HSET', h.key, 'x', int(h.x))
    call('PEXPIREAT', h.key, int(h.x))
    call('PEXPIREAT', queue, int(h.x))
  end
end

-- The mailbox's head, or a new life of it.
local function open_head(key, queue, candidate, ttl, more1, more2)
  local h = find_head(key, more1, more2)
  if not h then
    call('DEL', key, queue)
    h = { key = key, e = tonumber(candidate), b = 1, bc = 0, n = 0, nc = 0, x = 0, ds = '' }
    call('HSET', key, 'e', candidate, 'b', 1, 'bc', 0, 'n', 0, 'nc', 0, 'x', 0)
  end
  renew(h, queue, ttl)
  return h
end

-- The chain after a position; nil where the entry is not kept.
local function chain_at(h, queue, seq)
  if seq == h.n then return h.nc end
  if seq == h.b - 1 then return h.bc end
  if seq < h.b or seq > h.n then return nil end
  return entry_chain(call('LINDEX', queue, int(seq - h.b)))
end

local function parse_device(name, text)
  local seq, chain, generation, due, attempt, used, fence =
    match(text, '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)')
  if not seq then error('corrupt device') end
  return {
    name = name, seq = tonumber(seq), chain = tonumber(chain), generation = tonumber(generation),
    due = tonumber(due), attempt = tonumber(attempt), used = tonumber(used),
    fence = tonumber(fence),
  }
end

local function find_device(h, name)
  local text = call('HGET', h.key, 'd:' .. name)
  return text and parse_device(name, text)
end

local function save_device(h, d)
  call('HSET', h.key, 'd:' .. d.name, string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.0f',
    d.seq, d.chain, d.generation, d.due, d.attempt, d.used, d.fence))
end

-- All known devices, but for `except`.
local function other_devices(h, except)
  local names, fields, devices = {}, {}, {}
  for name in string.gmatch(h.ds, '[^%z]+') do
    if name ~= except then
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

local function save_names(h, devices)
  local names = {}
  for i, d in ipairs(devices) do names[i] = d.name end
  h.ds = table.concat(names, '\0')
  call('HSET', h.key, 'ds', h.ds)
end

-- Makes `d` a known device. Where there are `max` others, the one without a route that was unused
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
  local node, incarnation, connection, attempt, platform =
    match(text, '^(%S+) (%d+) (%d+) (%d+) ?(.*)$')
  if not node then error('corrupt route') end
  return {
    node = node, incarnation = incarnation, connection = connection,
    attempt = tonumber(attempt), platform = platform,
  }
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

-- Drops collapse keys that point below the oldest entry.
local function sweep_keys(h)
  if not h.kl or h.kl >= h.b then return end
  local fields, lowest = call('HGETALL', h.key), nil
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'k:' then
      local seq = tonumber(fields[i + 1])
      if seq < h.b then
        call('HDEL', h.key, fields[i])
      elseif not lowest or seq < lowest then
        lowest = seq
      end
    end
  end
  h.kl = lowest
  if lowest then
    call('HSET', h.key, 'kl', int(lowest))
  else
    call('HDEL', h.key, 'kl')
  end
end

-- Drops the entries up to `seq`; `chain` is the one after it.
local function trim(h, queue, seq, chain)
  if seq < h.b then return end
  call('LTRIM', queue, int(seq - h.b + 1), -1)
  h.b, h.bc = seq + 1, chain
  call('HSET', h.key, 'b', int(h.b), 'bc', int(chain))
  sweep_keys(h)
end

-- Puts a device's cursor before the oldest kept entry, with a new generation.
local function reset_device(h, d, generation)
  d.generation = math.max(d.generation, generation) + 1
  d.seq, d.chain = h.b - 1, h.bc
end

-- Runs `step` for each item; an item's error is that item's alone.
local function each(count, step, keys, args, first)
  local replies = { NOW_US }
  for i = 0, count - 1 do
    local ok, reply = pcall(step, i * keys + 1, i * args + first)
    if not ok then
      reply = { 'E', type(reply) == 'table' and reply.err or tostring(reply) }
    end
    replies[i + 2] = reply
  end
  return replies
end
