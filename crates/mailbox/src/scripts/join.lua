-- join: an access node has members of audiences, or has none any more. Allowed when Redis is full.
--
-- KEYS  an item: nodes, head, queue.
-- ARGV  lease ms; then an item: node, incarnation, number, 1 if the node has members else 0.
-- Reply now, then an item:
--       {'J', epoch (0: no mailbox), newest, chain after it, oldest}
--       {'S'}  a later request of this node was executed before: nothing was changed
--       {'U'}, {'E', text}
--
-- nodes  {s}:g:<app>:<audience>  hash: node -> "incarnation number confirmed_at", in ms. accept reads the names in the
--        script that appends: a message accepted before a join is in the mailbox that the join returns, one accepted
--        after it names the node. A node that has not confirmed for `lease` is removed by the next join of another
--        one; if there is none, all expire.

local LEASE = tonumber(ARGV[1])
local JOINED, SUPERSEDED = 'J', 'S'

-- Whether a later request of the node than this one wrote the field.
local function is_superseded(field, incarnation, number)
  local incarnation_before, number_before = match(field, '^(%d+) (%d+) ')
  incarnation_before, number_before = tonumber(incarnation_before), tonumber(number_before)
  if not incarnation_before then return false end
  return incarnation_before > incarnation
    or incarnation_before == incarnation and number_before > number
end

-- Removes nodes that have not confirmed for too long, or whose time is ahead of this Redis's.
local function sweep(nodes)
  local fields = call('HGETALL', nodes)
  for i = 1, #fields, 2 do
    local confirmed_at = tonumber(match(fields[i + 1], ' (%d+)$'))
    if not confirmed_at or confirmed_at + LEASE <= NOW or confirmed_at > NOW + LEASE then
      call('HDEL', nodes, fields[i])
    end
  end
end

local function join(key_at, arg_at)
  local nodes, node = KEYS[key_at], ARGV[arg_at]
  local incarnation, number = tonumber(ARGV[arg_at + 1]), tonumber(ARGV[arg_at + 2])
  local stored = call('HGET', nodes, node)
  if stored and is_superseded(stored, incarnation, number) then return { SUPERSEDED } end
  local mailbox = find_mailbox(KEYS[key_at + 1], KEYS[key_at + 2])
  if ARGV[arg_at + 3] == '1' then
    call('HSET', nodes, node, table.concat({ ARGV[arg_at + 1], ARGV[arg_at + 2], int(NOW) }, ' '))
    call('PEXPIRE', nodes, int(LEASE))
    sweep(nodes)
  elseif stored then
    call('HDEL', nodes, node)
  end
  if not mailbox then return { JOINED, 0, 0, 0, 1 } end
  return { JOINED, mailbox.epoch, mailbox.newest, mailbox.newest_chain, mailbox.oldest }
end

return each(#KEYS / 3, join, 3, 4, 2)
